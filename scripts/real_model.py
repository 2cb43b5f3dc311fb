"""The parts of `scripts/real_model` that are no command of `rmr1`: parity with Transformers, and the table at the end.

python scripts/real_model.py parity --model DIR --rows rewardbench.jsonl --out parity.json
python scripts/real_model.py table --out runs/real_model --trained distill_sft.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tyro

from rmr1_jax.eval.evaluate import load as load_pairs
from rmr1_jax.eval.intervals import share_interval
from rmr1_jax.eval.logs import read_judgements
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.prompts.prompt import get_prompt
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import strict_verdict

NEW_TOKENS = 64
TOLERANCE = 1e-4  # on logits of magnitude 10 to 30, in float32
JUDGED = {
    "before_published": ("before training", "published"),
    "before_ours": ("before training", "ours (`cor`)"),
    "after_published": ("after SFT", "published"),
    "after_ours": ("after SFT", "ours (`cor`)"),
}


def parity(model: Path, rows: Path, out: Path) -> None:
    """Compare a model with Transformers in float32: the rendered chat, the logits, and 64 greedy tokens.

    Args:
        model: Hugging Face directory.
        rows: RewardBench rows; the first one is the text.
        out: JSON file to write.
    """
    import tokenizers
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rmr1_jax import load

    policy = load(model, dtype="float32")
    messages = render_pair(get_prompt("cor"), next(load_pairs("rewardbench", rows)))
    ids = policy.tokenizer.render(messages)
    chat = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(chat, add_special_tokens=False).ids
    completion = policy.sample([ids], max_new_tokens=NEW_TOKENS, temperature=0.0)[0][0].token_ids
    ours = np.asarray(policy.logits(np.asarray([ids + completion])))[0]
    del policy
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        logits = reference(torch.tensor([ids + completion])).logits[0].numpy()
    found = {
        "prompt_tokens": len(ids),
        "same_rendered_chat": theirs == ids,
        "largest_difference_of_logits": float(np.abs(ours - logits).max()),
        "largest_logit": float(np.abs(logits).max()),
        # Transformers' choice after each prefix of our own tokens: all equal means the same greedy text.
        "same_greedy_tokens": logits[len(ids) - 1 : -1].argmax(-1).tolist() == completion,
        "greedy_tokens": len(completion),
    }
    print(json.dumps(found, indent=2))
    same = found["same_rendered_chat"] and found["same_greedy_tokens"]
    if not same or found["largest_difference_of_logits"] > TOLERANCE:
        sys.exit("error: the model differs from Transformers")
    out.write_text(json.dumps(found, indent=2) + "\n")


def table(out: Path, trained: Path) -> None:
    """Print the shares of valid traces and of right verdicts before and after training, and the seconds of each stage.

    A valid trace is complete and ends with a verdict that the strict rule reads. A verdict is right by the published
    rule, as in the benchmark. Intervals are 95% intervals (`eval/intervals.py`).

    Args:
        out: The directory that scripts/real_model wrote.
        trained: The rows that were trained on, to check that no judged question is among them.
    """
    structure = get_prompt(str(out / "prompt.yaml")).structure
    texts = trained.read_text()
    seconds = {file.name: int(file.read_text()) for file in (out / "done").iterdir()}
    print("| judge | prompt | valid traces | right verdicts | tokens a text | minutes |\n|---|---|---|---|---|---|")
    for name, (when, prompt) in JUDGED.items():
        rows = list(read_judgements(out / name / "judgements.jsonl"))
        if leaked := [row["id"] for row in rows if json.dumps(row.get("question", row["id"]))[1:-1] in texts]:
            sys.exit(f"error: the questions of {leaked} are among the rows that were trained on")
        traces = [row["texts"][0][0] if row["texts"] else "" for row in rows]
        valid = sum(bool(strict_verdict(t)) and parse_trace(t).is_complete(structure) for t in traces)
        right = sum(row["correct"] for row in rows)
        tokens = np.mean([row["tokens"][0][0] if row["tokens"] else 0 for row in rows])
        shares = f"{share(valid, len(rows))} | {share(right, len(rows))}"
        print(f"| {when} | {prompt} | {shares} | {tokens:.0f} | {seconds[name] / 60:.0f} |")
    print(f"\nSFT: {seconds['sft'] / 60:.0f} minutes; all stages: {sum(seconds.values()) / 60:.0f} minutes")


def share(count: int, total: int) -> str:
    low, high = share_interval(count, total)
    return f"{count} of {total} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"parity": parity, "table": table})
