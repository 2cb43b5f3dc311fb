"""Tokenizer directories in the forms that published chat models have, made from the small world's tokenizer."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<type>", "[[A]]")
DEEPSEEK = tuple(f"<\uff5c{name}\uff5c>" for name in ("begin\u2581of\u2581sentence", "User", "Assistant"))
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"

CHATML = """{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

# Earlier answers lose their thought; `enable_thinking=false` writes an empty one for the model.
QWEN3 = """{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == 'assistant' -%}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif -%}
        {%- if loop.last %}{% set content = '<think>\\n\\n</think>\\n\\n' + content %}{% endif -%}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}"""

NO_THOUGHT = "<think>\n\n</think>\n\n"  # the end of a prompt with enable_thinking=false

# The answer begins within a thought that the template opens.
DEEPSEEK_R1 = f"""{{{{- bos_token -}}}}
{{%- for message in messages -%}}
    {{%- if message.role == 'system' %}}{{{{ message.content }}}}
    {{%- elif message.role == 'user' %}}{{{{ '{DEEPSEEK[1]}' + message.content }}}}
    {{%- else %}}{{{{ '{DEEPSEEK[2]}' + message.content.split('</think>')[-1] + '{DEEPSEEK_END}' }}}}{{% endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt %}}{{{{ '{DEEPSEEK[2]}<think>\\n' }}}}{{% endif -%}}"""


def chat_model(
    source: Path, directory: Path, template: str = CHATML, *, special=(), plain=(), generation=None, **config
) -> Path:
    """Copy the tokenizer `source`, without the tags that it has as tokens, and with another chat template.

    special, plain: tokens to add, flagged as special or not. generation: the content of generation_config.json. config:
    entries of tokenizer_config.json; None removes one.
    """
    shutil.copytree(source, directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    entries = json.loads(path.read_text()) | {"chat_template": template} | config
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def with_template(source: Path, directory: Path, template: str = QWEN3, generation: dict | None = None) -> Path:
    """Copy a model or tokenizer directory, with another chat template, and a generation_config.json if there is one to
    write."""
    shutil.copytree(source, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def deepseek_distill(source: Path, directory: Path, **changes) -> Path:
    """A distilled Qwen: the role markers and the tags of a thought are tokens, but not flagged as special."""
    plain = (*DEEPSEEK[1:], "<think>", "</think>")
    special, ends = (DEEPSEEK[0], DEEPSEEK_END), {"bos_token": DEEPSEEK[0], "eos_token": DEEPSEEK_END}
    return chat_model(source, directory, DEEPSEEK_R1, special=special, plain=plain, **ends | changes)
