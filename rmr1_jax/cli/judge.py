"""The command that judges pairs: `rmr1 judge`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from rmr1_jax.cli.options import Dtype, MaybeFloat, MaybeInt, MaybePath


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePairs:
    """Judge a file of pairs. A killed run goes on where it stopped: run the same command again."""

    model: str
    """A Hugging Face directory (such as RUN/model), or a hub id."""
    input: Path
    """Pairs as JSONL, JSON or Parquet: our own rows, RewardBench, RM-Bench or RMB."""
    output: Path
    """JSONL to write, one row a pair: id, winner, status, votes, text, and correct where the better answer is known."""
    prompt: str = "cor"
    """cor, reasoning, compare, rubric, or a prompt file (`rmr1 data prompt` makes one for a published checkpoint)."""
    votes: int = 1
    """Texts for each pair and order; the majority of the valid verdicts wins."""
    both_orders: bool = False
    """Ask about (A, B) and about (B, A); a tie where the two disagree."""
    rule: Literal["strict", "eval"] = "strict"
    """How a verdict is read; eval is the published rule."""
    temperature: MaybeFloat = None
    """Of the sampling. Default: 0 (greedy) for one vote, 1 for several."""
    max_new_tokens: MaybeInt = None
    """Of one text. Default: 8192, or half of the model's positions where that is less."""
    max_prompt_tokens: MaybeInt = None
    """Pairs with a longer prompt are not asked: status too_long. Default: what the model's positions leave."""
    seed: int = 0
    """Of the sampling, and of the order in which chosen and rejected answers are shown."""
    batch_size: int = 1024
    """Pairs handed to the judge at a time; a killed run judges the batch that it was in again."""
    dtype: Dtype = "bfloat16"
    """Of the model's arithmetic."""
    rejects: MaybePath = None
    """JSONL for rows that cannot be read, with the reasons; without it, such a row is an error."""

    def run(self) -> None:
        from rmr1_jax.files.append import files_digest, model_digest
        from rmr1_jax.judge.file import judge_file
        from rmr1_jax.judge.judge import Judge
        from rmr1_jax.pairs.read import read_pairs
        from rmr1_jax.pairs.rows import ReadReport, source_files
        from rmr1_jax.policy import load
        from rmr1_jax.prompts.cor import get_prompt

        prompt = get_prompt(self.prompt)
        reading = {"seed": self.seed, "rejects": self.rejects}
        report = ReadReport()
        # All rows are read once before the model is: a bad one shows now, not after hours.
        total = sum(1 for _ in read_pairs(self.input, report=report, **reading))
        if report.rejected:
            print(f"{report}: see {self.rejects}", file=sys.stderr)
        policy = load(self.model, self.dtype)
        judge = Judge(
            policy,
            prompt,
            rule=self.rule,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            temperature=self.temperature,
        )
        directory = policy.tokenizer.directory
        weights = model_digest(directory)
        summary = judge_file(
            judge,
            read_pairs(self.input, **reading),
            self.output,
            votes=self.votes,
            both_orders=self.both_orders,
            seed=self.seed,
            batch_size=self.batch_size,
            total=total,
            identity={
                "model": f"{Path(self.model).name} (sha256 {weights})",
                "dtype": self.dtype,
                "input": f"{self.input.name} (sha256 {files_digest(source_files(self.input))})",
            },
        )
        print(f"{summary}\nwritten: {self.output}")
