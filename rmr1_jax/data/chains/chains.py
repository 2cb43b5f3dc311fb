"""Reasoning chains from a teacher, in two passes: the first judges, the second corrects what the first got wrong.

    ledger = make_chains(config, read_to_judge(config), Endpoint(config.teacher), Endpoint(config.second))

A pair goes through the same attempts in the same order whatever stops the run: `tries` by the first teacher, until one
is right, valid and tells nothing; then one by the second, which sees the last chain and the right verdict. Every answer
is on the disk before its slot takes the next request (OUT/answers.jsonl), and all that is known of a pair is read off
its answers: a killed run goes on and asks nothing twice that was answered. OUT/chains.jsonl (training rows in the
published format, in the order of the pairs) and OUT/ledger.json are made of the answers anew at each end of a run.

    read = right at first + right at second + failed + open

Next: `data/ledger.py`, which checks chains and counts; `prompts/teacher.py` for the second pass's wording;
`data/endpoint.py` and `judge_teacher.py`, the two kinds of teacher.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from rmr1_jax.config import check_least
from rmr1_jax.data.chains.correction import correction
from rmr1_jax.data.chains.ledger import Attempt, Case, Ledger, as_ledger, attempt_row, read_attempt
from rmr1_jax.endpoint import Answer, EndpointConfig, Request
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import alone, append_rows, files_digest, take_up
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import source_files
from rmr1_jax.prompts.cor import get_prompt
from rmr1_jax.prompts.prompt import Messages, Prompt

COMMAND = "rmr1 data chains"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """A policy of ours as the teacher. model: a directory or a hub id. max_new_tokens: of one text; None: 8192, or half
    of the model's positions where that is less. batch_size: pairs that are handed to the sampler at a time. slots:
    texts in flight, at most."""

    model: str
    dtype: str = "bfloat16"
    temperature: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0
    batch_size: int = 256
    slots: int = 64

    def __post_init__(self):
        for name, ok, wanted in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not ok:
                raise InputError(f"policy.{name}={getattr(self, name)!r} must be {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainsConfig:
    """One run of `rmr1 data chains`.

    pairs: a file or folder of pairs whose better answer is known, such as a mixture's pairs.jsonl. teacher or policy:
    who judges first. second: who corrects; None: nobody, what is wrong is left out. prompt: by name or file.
    escape_untrusted: whether the pairs' texts are escaped (`prompts/escape.py`); by default they are shown unchanged,
    as in all other training rows. tries: of the first teacher on a pair.
    keep_thinking: whether what stands before `</think>` belongs to the chain. budget_requests, budget_tokens: no
    request begins beyond that many (a retry after an error is none; tokens of prompts and answers), over all runs into
    `out`; larger ones go on. on_bad_row: "error", or "quarantine" into OUT/rejects.jsonl. seed: of the order in which
    chosen and rejected answers are shown, where the rows fix none.
    """

    pairs: str
    out: str
    prompt: str = "cor"
    escape_untrusted: bool = False
    teacher: EndpointConfig | None = None
    policy: PolicyConfig | None = None
    second: EndpointConfig | None = None
    tries: int = 1
    keep_thinking: bool = False
    budget_requests: int | None = None
    budget_tokens: int | None = None
    on_bad_row: str = "error"
    seed: int = 0

    def __post_init__(self):
        if (self.teacher is None) == (self.policy is None):
            raise InputError("one of teacher (an endpoint) and policy (a model of ours) must be given, and not both")
        check_least(self, 1, "tries", "budget_requests", "budget_tokens")
        if self.tries > 1 and (self.teacher or self.policy).temperature == 0:
            raise InputError(f"tries={self.tries} with temperature=0 would ask for one text {self.tries} times")
        if self.on_bad_row not in ("error", "quarantine"):
            raise InputError(f"on_bad_row={self.on_bad_row!r} must be error or quarantine")


class Teacher(Protocol):
    """Whoever answers: an `Endpoint`, or a policy of ours."""

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """(key, answer) for each request, as they come."""

    def settings(self) -> dict[str, Any]:
        """All that decides an answer, as plain values."""


def read_to_judge(config: ChainsConfig) -> list[PreferencePair]:
    """The pairs of `config`. InputError for a bad row, and for a pair whose better answer is not known."""
    rejects = None
    if config.on_bad_row == "quarantine":
        rejects = Path(config.out) / "rejects.jsonl"
        with writing(rejects):
            rejects.parent.mkdir(parents=True, exist_ok=True)
    reading = {"seed": config.seed, "on_bad_row": config.on_bad_row, "rejects": rejects}
    pairs = list(read_pairs(config.pairs, **reading))
    unknown = [pair.id for pair in pairs if pair.better is None]
    if unknown:
        shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise InputError(
            f"{config.pairs}: the better answer of {len(unknown)} pairs is not known ({shown}); a chain is checked "
            "against it: give `better`, or remove the rows"
        )
    if not pairs:
        raise InputError(f"{config.pairs}: holds no pair that can be read")
    return pairs


def make_chains(
    config: ChainsConfig, pairs: Sequence[PreferencePair], teacher: Teacher, second: Teacher | None = None
) -> Ledger:
    """Ask for the chains that `config.out` does not have yet, and write what there is. The pairs stay in memory.

    Returns the ledger; where a budget ended the run, pairs are left open in it.

    Raises:
        InputError: `config.out` was made with another config, or another run is at it; a teacher takes no request
            (wrong key, no such model).
        RunError: the disk or a teacher fails. What was answered stands: the same command goes on.
    """
    out = Path(config.out)
    prompt = dataclasses.replace(get_prompt(config.prompt), escape_untrusted=config.escape_untrusted)
    rounds = [(1, number) for number in range(config.tries)] + ([(2, 0)] if second else [])
    cases = {pair.id: Case(pair, prompt.structure, rounds, config.keep_thinking) for pair in pairs}
    answers = out / "answers.jsonl"

    def parse(row: dict[str, Any]) -> None:
        name, attempt = read_attempt(row)
        if name not in cases:
            raise ValueError(f"there is no pair {name!r}")
        cases[name].add(attempt)

    with alone(answers):
        take_up(answers, _settings(config, prompt, teacher, second), parse, command=COMMAND)
        budget = _Budget(config, cases.values())
        unanswered: dict[str, str] = {}
        try:
            for number, stage in enumerate(rounds):
                waiting = [case for case in cases.values() if case.waits_for(number)]
                if waiting and not budget.spent:
                    requests = budget.limit(_requests(waiting, prompt, stage))
                    asked = (teacher if stage[0] == 1 else second).ask(requests)
                    with tqdm(asked, total=len(waiting), desc=_title(stage), unit="pair", dynamic_ncols=True) as found:
                        unanswered |= _keep(found, stage, cases, budget, answers)
        finally:
            ledger = as_ledger(cases.values())
            write_whole(out / "chains.jsonl", (_row(case, prompt) for case in cases.values() if case.accepted))
            write_whole(out / "ledger.json", json.dumps(dataclasses.asdict(ledger), indent=2) + "\n")
    if unanswered:
        name, error = next(iter(unanswered.items()))
        raise RunError(
            f"{len(unanswered)} pairs got no answer, {name!r} for one: {error}; the others are on the disk, "
            "run the same command again"
        )
    return ledger


def _keep(
    found: Iterable[tuple[str, Answer]],
    stage: tuple[int, int],
    cases: Mapping[str, Case],
    budget: _Budget,
    answers: Path,
) -> dict[str, str]:
    """Write each answer when it comes. Returns why, by id, for those that got none."""
    unanswered = {}
    for name, answer in found:
        if answer.failure == "gave_up":
            unanswered[name] = answer.error or ""
            continue
        attempt = Attempt(*stage, answer)
        append_rows(answers, [attempt_row(name, attempt)])
        cases[name].add(attempt)
        budget.spend(answer)
    return unanswered


class _Budget:
    """What may still be asked; what is on the disk from earlier runs counts too."""

    def __init__(self, config: ChainsConfig, cases: Iterable[Case]):
        answers = [attempt.answer for case in cases for attempt in case.attempts]
        self.begun, self.tokens = len(answers), sum(answer.tokens for answer in answers)
        self.requests, self.most_tokens = config.budget_requests, config.budget_tokens

    @property
    def spent(self) -> bool:
        return (self.requests is not None and self.begun >= self.requests) or (
            self.most_tokens is not None and self.tokens >= self.most_tokens
        )

    def limit(self, requests: Iterable[Request]) -> Iterator[Request]:
        for request in requests:
            if self.spent:
                return
            self.begun += 1
            yield request

    def spend(self, answer: Answer) -> None:
        if self.most_tokens is not None and answer.text and not answer.tokens:
            raise RunError("the endpoint does not say how many tokens it used; set budget_requests, not budget_tokens")
        self.tokens += answer.tokens


def _requests(cases: Iterable[Case], prompt: Prompt, stage: tuple[int, int]) -> Iterator[Request]:
    number, attempt = stage
    for case in cases:
        messages: Messages = render_pair(prompt, case.pair)
        if number == 2:
            last = case.attempts[-1]
            chain = "" if last.answer.error else case.chain(last)
            messages = correction(messages, chain, case.pair.better, case.reason(last))
        yield Request(case.pair.id, messages, attempt)


def _title(stage: tuple[int, int]) -> str:
    number, attempt = stage
    return "second pass" if number == 2 else "first pass" + (f", try {attempt + 1}" if attempt else "")


def _settings(config: ChainsConfig, prompt: Prompt, teacher: Teacher, second: Teacher | None) -> dict[str, Any]:
    def wording(*texts: Any) -> str:
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    path = Path(config.pairs)
    note = correction([{"role": "user", "content": ""}], "chain", "A", "reason")
    return {
        "pairs": f"{path.name} (sha256 {files_digest(source_files(path))})",
        "prompt": f"{prompt.name} (sha256 {wording(prompt.system, prompt.single_turn, prompt.multi_turn)})",
        "escape_untrusted": config.escape_untrusted,
        "seed": config.seed,
        "tries": config.tries,
        "keep_thinking": config.keep_thinking,
        "teacher": teacher.settings(),
        "second": {**second.settings(), "note": f"sha256 {wording(note)}"} if second else None,
    }


def _row(case: Case, prompt: Prompt) -> str:
    row = {
        "id": case.pair.id,
        "source": str(case.pair.meta.get("source", "")),
        "context_messages": render_pair(prompt, case.pair),
        "winner": case.chain(case.accepted),
        "better": case.pair.better,
        "pass": case.accepted.stage,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
