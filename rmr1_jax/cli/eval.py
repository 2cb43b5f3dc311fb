"""The commands `rmr1 eval` and `rmr1 score`: each is a dataclass with its options and a `run` that calls the library.

Next: `cli.py`, which collects them; `eval/run.py`, which they call.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from rmr1_jax.cli.options import Dtype, MaybeFloat, MaybeInt, MaybeText
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.judge.endpoint import EndpointJudge
    from rmr1_jax.judge.judge import Judge
    from rmr1_jax.judge.judgement import AnyJudge
    from rmr1_jax.judge.scalar import ScalarJudge


Benchmark = Annotated[Positional[Literal["rewardbench", "rm-bench", "rmb", "judgebench"]], arg(metavar="BENCHMARK")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a judge on a benchmark, as published. A killed run goes on where it stopped: run the command again."""

    benchmark: Annotated[
        Positional[Literal["rewardbench", "rm-bench", "rmb", "judgebench", "injection"]], arg(metavar="BENCHMARK")
    ]
    """rewardbench, rm-bench, rmb, or judgebench (which is published with --both-orders); or injection, our attacks on
    the judge itself, which need no data."""
    model: str
    """A Hugging Face directory (such as RUN/model), or a hub id; or the model's name at the endpoint."""
    judge: Literal["policy", "scalar", "endpoint"] = "policy"
    """What the model is: a policy that writes traces, a scalar reward model, or one behind an OpenAI-style endpoint."""
    data: MaybeText = None
    """The benchmark's file or folder, or a hub id such as allenai/reward-bench."""
    out: Path
    """Directory for judgements.jsonl, summary.json and the published logs and score files; or for injection.json."""
    prompt: str = "cor"
    """cor, reasoning, compare, rubric, or a prompt file (`rmr1 data prompt` makes one for a published checkpoint)."""
    rule: Literal["auto", "eval", "strict"] = "auto"
    """How a verdict is read. auto: by eval, the published rule; on injection by strict, as `rmr1 judge` does."""
    votes: int = 1
    """Texts for each pair and order; the majority of the valid verdicts wins."""
    both_orders: bool = False
    """Ask about (A, B) and about (B, A); a tie, which is not right, where the two disagree."""
    temperature: MaybeFloat = None
    """Of the sampling. Default: 0 (greedy, as published) for one vote, 1 for several."""
    max_new_tokens: MaybeInt = None
    """Of one text. Default: 8192, or half of the model's positions where that is less."""
    max_prompt_tokens: MaybeInt = None
    """Pairs with a longer prompt are not asked: status too_long. Default: what the model's positions leave."""
    seed: int = 0
    """Of the sampling. The A/B order is the published one, whatever the seed."""
    limit: MaybeInt = None
    """Judge that many items, spread evenly over the data, for a look. Without it a later run judges the rest."""
    batch_size: int = 1024
    """Pairs handed to the judge at a time; a killed run judges the batch that it was in again."""
    slots: int = 64
    """Texts written at once, at most. Lower it when memory runs out."""
    dtype: Dtype = "bfloat16"
    """Of the model's arithmetic."""
    escape_untrusted: Literal["auto", "on", "off"] = "auto"
    """Escape imitated delimiters, verdicts and control tokens inside the answers. auto: off, as in the published
    evaluations, but on for injection, as in `rmr1 judge`."""
    forced_budgets: bool = False
    """Also the curve by token budget with forced verdicts: cut texts are continued with the likelier answer."""
    base_url: MaybeText = None
    """Of the endpoint, such as http://127.0.0.1:8000/v1. Default: OpenAI's."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the endpoint's key; "" for an endpoint that wants none."""
    concurrency: int = 8
    """Requests to the endpoint at once."""

    def reading(self) -> dict[str, Any]:
        """How texts are shown and verdicts read, as a judge's options: as published, or as for untrusted texts."""
        untrusted = self.benchmark == "injection"
        rule = ("strict" if untrusted else "eval") if self.rule == "auto" else self.rule
        escape = untrusted if self.escape_untrusted == "auto" else self.escape_untrusted == "on"
        return {"rule": rule, "escape_untrusted": escape}

    def run(self) -> None:
        from rmr1_jax.eval.evaluate import BENCHMARKS, evaluate, load
        from rmr1_jax.files.append import files_digest
        from rmr1_jax.files.hub import locate
        from rmr1_jax.pairs.rows import source_files

        if self.forced_budgets and self.judge != "policy":
            raise InputError(
                f"--forced-budgets continues texts with a policy; it does not go with --judge {self.judge}"
            )
        if self.benchmark == "injection":
            return self._injection()
        if self.data is None:
            raise InputError(f"--data is missing: the file, folder or hub id of {self.benchmark}")
        data = locate(self.data)
        # All rows are read once before the model is: a bad one shows now, not after hours.
        total = sum(1 for _ in load(self.benchmark, data, self.limit))
        judge, name, identity = make_judge(self)
        counts, scores = evaluate(
            self.benchmark,
            judge,
            data,
            self.out,
            name=name,
            votes=self.votes,
            both_orders=self.both_orders,
            seed=self.seed,
            batch_size=self.batch_size,
            limit=self.limit,
            total=total,
            identity={**identity, "data": f"{Path(self.data).name} (sha256 {files_digest(source_files(data))})"},
            cut=_cutter(judge),
        )
        if self.forced_budgets:
            from rmr1_jax.eval.forced import force_verdicts
            from rmr1_jax.eval.summary import write_summary

            force_verdicts(judge, self.out)
            write_summary(self.out, scores[BENCHMARKS[self.benchmark].SCORE], judge=name, cut=_cutter(judge))
        print(f"{counts}\n{_lines(self.benchmark, scores)}\nwritten: {self.out}\nnext:    rmr1 report {self.out}")

    def _injection(self) -> None:
        from rmr1_jax.eval.attacks.injection import injection, injection_table

        if self.data is not None:
            raise InputError(f"--data {self.data}: injection has its own pairs; leave it out")
        judge, name, identity = make_judge(self)
        options = {"votes": self.votes, "both_orders": self.both_orders, "seed": self.seed}
        options |= {"batch_size": self.batch_size, "limit": self.limit, "identity": identity}
        print(f"{injection_table(injection(judge, self.out, name=name, **options))}\nwritten: {self.out}")


def make_judge(command: Eval) -> tuple[AnyJudge, str, dict[str, Any]]:
    """The judge that the options ask for, its name, and what tells it from others (`judge_file`'s identity)."""
    made = {"policy": _policy_judge, "scalar": _scalar_judge, "endpoint": _endpoint_judge}[command.judge]
    name = Path(command.model).resolve().name if Path(command.model).is_dir() else command.model.rsplit("/", 1)[-1]
    judge, directory = made(command)
    if directory is None:
        return judge, name, {}
    from rmr1_jax.files.append import model_digest

    weights = model_digest(directory)
    return judge, name, {"model": f"{name} (sha256 {weights})", "dtype": command.dtype}


def _policy_judge(command: Eval) -> tuple[Judge, Path]:
    from rmr1_jax.judge.judge import Judge
    from rmr1_jax.policy import load
    from rmr1_jax.prompts.cor import get_prompt

    prompt = get_prompt(command.prompt)  # before the weights: a mistake in it shows at once
    policy = load(command.model, command.dtype)
    judge = Judge(
        policy,
        prompt,
        max_new_tokens=command.max_new_tokens,
        max_prompt_tokens=command.max_prompt_tokens,
        temperature=command.temperature,
        slots=command.slots,
        **command.reading(),
    )
    return judge, policy.tokenizer.directory


def _scalar_judge(command: Eval) -> tuple[ScalarJudge, Path]:
    from rmr1_jax.judge.scalar import ScalarJudge, load_scalar

    model = load_scalar(command.model, command.dtype)
    return ScalarJudge(model), model.tokenizer.directory


def _endpoint_judge(command: Eval) -> tuple[EndpointJudge, None]:
    from rmr1_jax.endpoint import Endpoint, EndpointConfig
    from rmr1_jax.judge.endpoint import EndpointJudge
    from rmr1_jax.sampler.sample import LONGEST

    config = EndpointConfig(
        model=command.model,
        base_url=command.base_url,
        key_variable=command.key_variable or None,
        max_tokens=command.max_new_tokens or LONGEST,
        concurrency=command.concurrency,
    )
    judge = EndpointJudge(
        Endpoint(config),
        command.prompt,
        temperature=command.temperature,
        **command.reading(),
    )
    return judge, None


def _cutter(judge: Any) -> Callable[[str, int], str] | None:
    """(text, n) -> its first n tokens, where the judge is a policy and the tokenizer is at hand."""
    policy = getattr(judge, "policy", None)
    return None if policy is None else lambda text, n: policy.tokenizer.decode(policy.tokenizer.encode(text)[:n])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two runs on the same pairs: agreement, McNemar's test, the difference of the scores and its interval."""

    runs: Annotated[Positional[tuple[Path, Path]], arg(metavar="A B", help_behavior_hint="")]
    """Directories of `rmr1 eval` or `rmr1 score`, or files of judgements or verdicts."""
    json: bool = False
    """Print a JSON object instead of a table."""

    def run(self) -> None:
        from json import dumps

        from rmr1_jax.eval.compare import compare, comparison_text

        found = compare(*self.runs)
        print(dumps(found) if self.json else comparison_text(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Compute a benchmark's scores from logs alone, ours or published; needs no accelerator."""

    benchmark: Benchmark
    """rewardbench, rm-bench, rmb or judgebench."""
    logs: Path
    """judgements.jsonl, a published log, or a directory that holds the logs of a run."""
    out: Path
    """Directory for judgements.jsonl, summary.json and the published score files."""
    rule: Literal["as-logged", "eval", "strict"] = "as-logged"
    """How a verdict is read; eval is the published rule. By default the results stand as they are in the logs."""
    compat: Literal["none", "released"] = "none"
    """released reproduces the released RM-Bench scorer, which reads its third file twice and its second never."""

    def run(self) -> None:
        from rmr1_jax.eval.evaluate import score_logs

        compat = None if self.compat == "none" else self.compat
        rule = None if self.rule == "as-logged" else self.rule
        scores, failures = score_logs(self.benchmark, self.logs, self.out, compat=compat, rule=rule)
        if scores:
            print(f"{_lines(self.benchmark, scores)}\nwritten: {self.out}\nnext:    rmr1 report {self.out}")
        if failures:
            for failure in failures[1:]:
                print("error:", " ".join(str(failure).split()), file=sys.stderr)
            raise InputError(f"{failures[0]} (not counted in the scores)")


def _lines(benchmark: str, scores: dict[str, Any]) -> str:
    """The benchmark's main scores, one a line."""
    from rmr1_jax.eval.evaluate import BENCHMARKS

    return "\n".join(f"{value:8.2%}  {name}" for name, value in scores[BENCHMARKS[benchmark].SCORE].items())
