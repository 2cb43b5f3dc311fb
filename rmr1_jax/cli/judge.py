"""The command that judges pairs, `rmr1 judge`. Next: `judge_options.py`, whose options `rmr1 eval` has too."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from rmr1_jax.cli.judge_options import AnyJudgeOptions, print_summary
from rmr1_jax.cli.options import (
    MaybeInt,
    MaybePath,
    MaybeText,
    all_processes,
    starting,
)
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.judge.file import Output
    from rmr1_jax.judge.judgement import AnyJudge
    from rmr1_jax.pairs.pair import PreferencePair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(AnyJudgeOptions):
    """Judge a file of preference pairs, or one question with two answers. To continue a run that was killed, run the
    same command again."""

    texts: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[QUESTION ANSWER_A ANSWER_B]", help_behavior_hint="")
    ] = ()
    """One question and its two answers, instead of --input; the trace and the verdict are printed. A single - reads one
    of the three from the standard input."""
    model: MaybeText = None
    """The model: a Hugging Face directory (such as RUN/model), a hub id, or the model's name at the endpoint."""
    judge: Literal["policy", "endpoint"] = "policy"
    """Kind of the model: a policy that writes traces, or a model behind an OpenAI-style endpoint."""
    input: MaybePath = None
    """File of pairs: JSONL, JSON, Parquet or CSV, perhaps compressed with gzip, in our own format, in that of TRL,
    OpenRLHF, UltraFeedback, HelpSteer or OpenRubrics, or in that of a benchmark."""
    output: MaybePath = None
    """JSONL file to write, with one row for each pair: id, winner, status, votes, text, the question and the answers,
    tokens, why texts end and why there is no verdict, and correct if the better answer is known. One question needs
    none."""
    no_texts: bool = False
    """Leave the question and the answers out of the rows."""
    rule: Literal["strict", "eval"] = "strict"
    """Rule that reads the verdict from a text. eval is the rule of the published evaluations."""
    reread: MaybePath = None
    """File of `rmr1 judge` or `rmr1 eval` whose texts are read again by --rule, without the model. The counts are
    printed, and with --output the rows are written."""
    limit: MaybeInt = None
    """Judge only this many pairs, spread evenly over the file. A later run without the limit judges the rest."""
    seed: int = 0
    """Random seed of the sampling, and of the order in which chosen and rejected answers are shown."""
    rejects: MaybePath = None
    """JSONL file for rows that cannot be read, with the reasons. Without it, such a row is an error."""
    profile: MaybePath = None
    """Directory for a profile of the judging, for XProf or TensorBoard. Everything is recorded, compilation too, so
    give it a file of a few pairs."""

    def run(self) -> None:
        given = [name for name in ("texts", "input", "reread") if getattr(self, name)]
        if len(given) != 1:
            raise InputError(
                "give a question and two answers, or --input FILE, or --reread FILE"
                + (f"; not {' and '.join(given)} together" if given else "")
            )
        if not self.reread and self.model is None:
            raise InputError("--model is missing: a Hugging Face directory, such as RUN/model, or a hub id")
        self.check_options()
        {"texts": self._run_texts, "input": self._run_input, "reread": self._run_reread}[given[0]]()

    def _run_input(self) -> None:
        if self.output is None:
            raise InputError("--output is missing: the JSONL file to write")
        # All rows are read before the model is loaded, so that a bad row shows now and not after hours.
        with starting(f"judge: reading {self.input}, for {self.model}"):
            report, total = self._check_input()
        with starting("loading JAX"):
            from rmr1_jax.distributed.profile import profiling
            from rmr1_jax.files.append import files_digest
            from rmr1_jax.judge.file import judge_file
            from rmr1_jax.pairs.containers import source_files

        with all_processes(loads_model=self.judge != "endpoint") as first:
            if report.rejected and first:
                print(f"{report}: see {self.rejects}", file=sys.stderr)
            judge, identity = self._load(self.output)
            data = f"{self.input.name} (sha256 {files_digest(source_files(self.input))})"
            output, voting = self._output({**identity, "input": data}), self.voting()
            with profiling(self.profile):
                sizes = {"batch_size": self.pairs_at_a_time(judge), "total": min(total, self.limit or total)}
                summary = judge_file(judge, self._pairs(total), output, voting, **sizes)
            self.print_stats(judge)
            if first:
                print_summary(summary, judge.settings(voting))
                print(f"written: {self.output}\nnext:    rmr1 report {self.output}")

    def _run_texts(self) -> None:
        """Judge one question, print the trace and the verdict, and write a row if there is an output."""
        import hashlib
        import json

        from rmr1_jax.cli.trace import trace_text, verdict_text, wants_colour
        from rmr1_jax.pairs.pair import PreferencePair

        with starting(f"judge: one question, for {self.model}"):
            from rmr1_jax.distributed.terminal import waiting
            from rmr1_jax.judge.file import judge_file
            from rmr1_jax.judge.rows import verdict_row
            from rmr1_jax.judge.summary import Outcome, Summary

            pair, voting = PreferencePair.from_answers("1", *self._read_texts()), self.voting()
        with all_processes(loads_model=self.judge != "endpoint") as first:
            judge, identity = self._load(self.output)
            if self.output is None:
                with waiting(f"judging with {self.model}"):
                    judgement = judge.compare_many([pair], **dataclasses.asdict(voting))[0]
                row = verdict_row(pair, judgement)
            else:
                digest = hashlib.sha256(repr(pair.conversation_a + pair.conversation_b).encode()).hexdigest()[:16]
                identity |= {"input": f"one question (sha256 {digest})"}
                judge_file(judge, [pair], self._output(identity), voting)
                row = json.loads(self.output.read_text(encoding="utf-8"))
            self.print_stats(judge)
            if first:
                colour, summary = wants_colour(), Summary.of([Outcome.of(row)])
                trace = trace_text(row["text"], colour=colour)
                print("\n".join(filter(None, (trace, verdict_text(row, colour=colour)))))
                for line in summary.remedies(judge.settings(voting)):
                    print(line)

    def _run_reread(self) -> None:
        from rmr1_jax.eval.logs import settings_of
        from rmr1_jax.eval.reread import reread

        print_summary(reread(self.reread, self.rule, self.output), {**settings_of(self.reread), "rule": self.rule})
        if self.output:
            print(f"written: {self.output}\nnext:    rmr1 report {self.output}")

    def _load(self, output: Path | None) -> tuple[AnyJudge, dict[str, Any]]:
        """The judge, and what identifies its model."""
        if self.judge == "endpoint":
            return self.load_endpoint_judge(rule=self.rule), {}
        judge = self.load_judge(output, rule=self.rule)
        return judge, self.identity(judge.policy.tokenizer.directory, judge.policy.dtype)

    def _output(self, identity: Mapping[str, Any]) -> Output:
        from rmr1_jax.judge.file import Output
        from rmr1_jax.judge.rows import verdict_row

        row_of = functools.partial(verdict_row, with_pair=not self.no_texts)
        return Output(path=self.output, identity=identity, row_of=row_of)

    def _check_input(self) -> tuple[Any, int]:
        """The report on reading all rows of the input, and the number of pairs."""
        from rmr1_jax.pairs.read import read_pairs
        from rmr1_jax.pairs.rows import ReadReport

        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}: expected at least 1")
        report = ReadReport()
        return report, sum(1 for _ in read_pairs(self.input, report=report, seed=self.seed, rejects=self.rejects))

    def _pairs(self, total: int) -> Iterator[PreferencePair]:
        """The pairs of the input, or as many of them as the limit says, spread evenly."""
        from rmr1_jax.eval.evaluate import chosen
        from rmr1_jax.pairs.read import read_pairs

        pairs = read_pairs(self.input, seed=self.seed, rejects=self.rejects)
        return (pair for k, pair in enumerate(pairs) if self.limit is None or chosen(k, self.limit, total))

    def _read_texts(self) -> list[str]:
        """The question and the two answers, one of them perhaps from the standard input."""
        if len(self.texts) != 3:
            raise InputError(
                f"{len(self.texts)} texts are given; expected three, each in quotation marks: rmr1 judge --model M "
                '"question" "answer A" "answer B"'
            )
        if self.texts.count("-") > 1:
            raise InputError("- stands for several texts; the standard input can give one of them")
        return [sys.stdin.read() if text == "-" else text for text in self.texts]
