"""The stages of the quickstart with their minutes, which are printed before anything is loaded: imports no JAX."""

from __future__ import annotations

from pathlib import Path

# Minutes of each stage with its evaluation, on the two idle cores of the measurement in README.md.
STAGES = (
    ("questions, a teacher's traces, and a judge with random weights", 0.5),
    ("SFT: the judge learns to write traces as the teacher does, whose verdicts are biased", 3.5),
    ("GRPO: rewarded for right verdicts, it unlearns the bias", 2),
)
CONTROL = ("control: more SFT for as long as GRPO took", 2)


def plan_text(out: Path, *, control: bool) -> str:
    """The stages with their minutes, and where the results will be."""
    stages = [*STAGES, CONTROL] if control else STAGES
    total = sum(minutes for _, minutes in stages)
    lines = [f"quickstart: train and evaluate a small judge, in about {total:g} minutes on two idle CPU cores"]
    lines += [f"  {number}. {text} (about {minutes:g} min)" for number, (text, minutes) in enumerate(stages, 1)]
    again = "the results of an earlier start are there, and it resumes" if (out / "sft").is_dir() else "new"
    return "\n".join([*lines, f"  to {out} ({again}); Ctrl-C stops it, and the same command resumes it"])
