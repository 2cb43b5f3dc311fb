"""The commands about benchmarks: `rmr1 eval`, `rmr1 score` and `rmr1 compare`. Next: `eval/evaluate.py`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from rmr1_jax.cli.judge_options import AnyJudgeOptions, earlier_settings, print_summary
from rmr1_jax.cli.options import MaybeInt, MaybeText, all_processes, template_arguments
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.eval.evaluate import NamedJudge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(AnyJudgeOptions):
    """Evaluate a judge on a benchmark, as published. To continue a run that was killed, run the same command again."""

    benchmark: Annotated[
        Positional[Literal["rewardbench", "rm-bench", "rmb", "judgebench", "injection"]], arg(metavar="BENCHMARK")
    ]
    """rewardbench, rm-bench, rmb or judgebench (published with --both-orders); or injection, a set of attacks on the
    judge itself, which needs no data."""
    judge: Literal["policy", "scalar", "endpoint"] = "policy"
    """Kind of the model: a policy that writes traces, a scalar reward model, or a model behind an OpenAI-style
    endpoint."""
    data: MaybeText = None
    """The benchmark's file or folder, or a hub id such as allenai/reward-bench."""
    out: Path
    """Directory for judgements.jsonl, summary.json and the published logs and score files, or for injection.json."""
    rule: Literal["auto", "eval", "strict"] = "auto"
    """Rule that reads the verdict from a text. auto is eval, the rule of the published evaluations, but strict for
    injection, as in `rmr1 judge`."""
    seed: int = 0
    """Random seed of the sampling. The order of A and B is the published one for every seed."""
    limit: MaybeInt = None
    """Judge only this many items, spread evenly over the data. A later run without the limit judges the rest."""
    escape_untrusted: Literal["auto", "on", "off"] = "auto"
    """Escape imitated delimiters, verdicts and control tokens inside the answers. auto is off, as in the published
    evaluations, but on for injection, as in `rmr1 judge`."""
    forced_budgets: bool = False
    """Also compute the curve by token budget with forced verdicts: cut texts continue with the likelier verdict."""

    def reading(self) -> dict[str, Any]:
        """How texts are shown and verdicts are read: as published, or for injection as for untrusted texts."""
        untrusted = self.benchmark == "injection"
        rule = ("strict" if untrusted else "eval") if self.rule == "auto" else self.rule
        escape = untrusted if self.escape_untrusted == "auto" else self.escape_untrusted == "on"
        return {"rule": rule, "escape_untrusted": escape}

    def run(self) -> None:
        self.check_options()
        if self.forced_budgets and self.judge != "policy":
            raise InputError(f"--forced-budgets needs a policy to continue texts, not --judge {self.judge}")
        if self.benchmark == "injection":
            self._run_injection()
        else:
            self._run_benchmark()

    def _run_benchmark(self) -> None:
        from rmr1_jax.eval.evaluate import evaluate, load
        from rmr1_jax.eval.registry import BENCHMARKS
        from rmr1_jax.files.append import files_digest
        from rmr1_jax.files.hub import locate
        from rmr1_jax.pairs.containers import source_files

        if self.data is None:
            raise InputError(f"--data is missing: the file, folder or hub id of {self.benchmark}")
        data, voting = locate(self.data), self.voting()
        # All rows are read before the model is loaded, so that a bad row shows now and not after hours.
        total = sum(1 for _ in load(self.benchmark, data, self.limit))
        with all_processes(loads_model=self.judge != "endpoint") as first:
            judge = make_judge(self)
            hashed = f"{Path(self.data).name} (sha256 {files_digest(source_files(data))})"
            judge = dataclasses.replace(judge, identity={**judge.identity, "data": hashed})
            pairs = load(self.benchmark, data, self.limit)
            sizes = {"batch_size": self.pairs_at_a_time(judge.judge), "total": total}
            counts, scores = evaluate(self.benchmark, judge, pairs, self.out, voting, **sizes)
            if self.forced_budgets:
                from rmr1_jax.eval.forced import force_verdicts
                from rmr1_jax.eval.summary import write_summary

                force_verdicts(judge.judge, self.out)
                main = scores[BENCHMARKS[self.benchmark].main_scores]
                if first:
                    write_summary(self.out, main, judge=judge.name, cut=judge.cut)
            self.print_stats(judge.judge)
            if first:
                print_summary(counts, judge.judge.settings(voting))
                print(_scores(self.out))

    def _run_injection(self) -> None:
        from rmr1_jax.eval.attacks.injection import injection, injection_table

        if self.data is not None:
            raise InputError(f"--data {self.data}: injection has its own pairs; leave --data out")
        voting = self.voting()
        with all_processes(loads_model=self.judge != "endpoint") as first:
            judge = make_judge(self)
            result = injection(judge, self.out, voting, batch_size=self.pairs_at_a_time(judge.judge), limit=self.limit)
            self.print_stats(judge.judge)
            if first:
                print(f"{injection_table(result)}\nwritten: {self.out}")


def make_judge(command: Eval) -> NamedJudge:
    """Load the judge that the options name."""
    from rmr1_jax.eval.evaluate import NamedJudge
    from rmr1_jax.eval.logs import JUDGEMENTS

    output = command.out / JUDGEMENTS
    if command.judge == "endpoint":
        return NamedJudge(judge=command.load_endpoint_judge(**command.reading()), name=command.model_name())
    if command.judge == "scalar":
        from rmr1_jax.judge.scalar import ScalarJudge, load_scalar

        arguments = template_arguments(command.chat_template_kwargs)
        dtype = command.settled_dtype(earlier_settings(output))
        model = load_scalar(command.model, dtype, tensor=command.tensor, chat_template_kwargs=arguments)
        judge = ScalarJudge(model)
    else:
        judge = command.load_judge(output, **command.reading())
        model = judge.policy
    identity = command.identity(model.tokenizer.directory, model.dtype)
    return NamedJudge(judge=judge, name=command.model_name(), identity=identity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two runs on the same pairs: their agreement, McNemar's test, and the difference of their scores with its
    interval."""

    runs: Annotated[Positional[tuple[Path, Path]], arg(metavar="A B", help_behavior_hint="")]
    """Two directories of `rmr1 eval` or `rmr1 score`, or files of judgements or of verdicts."""
    json: bool = False
    """Print a JSON object instead of a table."""

    def run(self) -> None:
        from json import dumps

        from rmr1_jax.eval.compare import compare, comparison_text

        found = compare(*self.runs)
        print(dumps(found) if self.json else comparison_text(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Compute the scores of a benchmark from logs alone, ours or published. Needs no accelerator."""

    benchmark: Annotated[Positional[Literal["rewardbench", "rm-bench", "rmb", "judgebench"]], arg(metavar="BENCHMARK")]
    """rewardbench, rm-bench, rmb or judgebench."""
    logs: Path
    """A judgements.jsonl, a published log, or a directory with the logs of a run."""
    out: Path
    """Directory for judgements.jsonl, summary.json and the published score files."""
    rule: Literal["as-logged", "eval", "strict"] = "as-logged"
    """Rule that reads the verdicts from the texts again; eval is the rule of the published evaluations. as-logged keeps
    the results of the logs."""
    compat: Literal["none", "released"] = "none"
    """released reproduces the mistake of the released RM-Bench scorer, which reads its third file twice and its second
    file never."""

    def run(self) -> None:
        from rmr1_jax.eval.evaluate import score_logs

        rule, released = None if self.rule == "as-logged" else self.rule, self.compat == "released"
        scores, failures = score_logs(self.benchmark, self.logs, self.out, released=released, rule=rule)
        if scores:
            print(_scores(self.out))
        if failures:
            for failure in failures[1:]:
                print("error:", " ".join(str(failure).split()), file=sys.stderr)
            raise InputError(f"{failures[0]} (not counted in the scores)")


def _scores(out: Path) -> str:
    """The scores in a run's summary, where the run is, and what shows it."""
    from rmr1_jax.eval.summary import SUMMARY, scores_text
    from rmr1_jax.files.untrusted import read_object

    return f"{scores_text(read_object(out / SUMMARY))}\nwritten: {out}\nnext:    rmr1 report {out}"
