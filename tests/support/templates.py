"""A model with a chat template that takes an argument, as Qwen3's takes `enable_thinking`."""

import json
import shutil
from pathlib import Path

THINKING_TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
NO_THOUGHT = "<think>\n\n</think>\n\n"  # the end of a prompt with enable_thinking=false


def with_template(
    source: Path, target: Path, template: str = THINKING_TEMPLATE, generation: dict | None = None
) -> Path:
    """Copy a model directory, with another chat template, and a generation_config.json if there is one to write."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    if generation is not None:
        (target / "generation_config.json").write_text(json.dumps(generation))
    return target
