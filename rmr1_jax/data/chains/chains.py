"""`rmr1 data chains`: reasoning chains from teachers, in two passes. The second corrects what the first got wrong.

Every pair gets the same attempts in the same order, however often the run is stopped: `tries` by the first teacher
until a chain is accepted (`ledger.py` has the conditions), then one by the second teacher, which is shown the last
chain and the right verdict. Every answer is on the disk (OUT/answers.jsonl) before the next request begins in its
place: a run that was killed continues, and repeats no request that was answered. At the end of each run the answers
give OUT/chains.jsonl (training rows in the published format, in the order of the pairs) and OUT/ledger.json. Of several
processes, each asks about its share of the pairs (`distributed/rows.py`).

Next: `ledger.py`, which checks and counts chains; `correction.py`, the request of the second pass; `endpoint.py` and
`policy_teacher.py`, the two kinds of teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt
from tqdm import tqdm

from rmr1_jax.config import config_dataclass
from rmr1_jax.data.chains.correction import correction
from rmr1_jax.data.chains.ledger import Attempt, Ledger, PairAttempts, Turn, attempt_row, make_ledger, read_attempt
from rmr1_jax.distributed.exchange import first, from_first, gather, own_share, this_process
from rmr1_jax.distributed.rows import SharedRows
from rmr1_jax.endpoint import EndpointConfig, Request
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import files_digest
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.pairs.containers import source_files
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.prompts.prompt import Prompt, get_prompt
from rmr1_jax.reply import Answer, Unanswered


@config_dataclass
class PolicyConfig:
    """A model of this package as the teacher."""

    model: str
    """Directory or hub id of the model."""
    chat_template_kwargs: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)
    """Arguments for the model's chat template, such as {enable_thinking: false} for Qwen3."""
    dtype: str = "bfloat16"
    """Data type of the matrix products."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature. 0 is greedy."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of a text in tokens. null: 8192, or half of the model's positions if that is less."""
    seed: NonNegativeInt = 0
    """Seed of the sampling."""
    batch_size: PositiveInt = 256
    """Pairs that are handed to the samplers of all processes at a time."""
    slots: PositiveInt | None = None
    """Most texts that each process samples at the same time. null: 64 for each copy of the weights."""
    tensor: PositiveInt | None = None
    """Devices that share one copy of the weights. null: the smallest number with which the weights take at most half of
    each device's memory."""


@config_dataclass
class ChainsConfig:
    """The settings of `rmr1 data chains`."""

    pairs: str
    """A file or folder of pairs whose better answer is known, such as a mixture's pairs.jsonl."""
    out: str
    """Directory to write."""
    prompt: str | None = None
    """Prompt of the teacher: cor, reasoning, compare, rubric, or a prompt file. null: prompt.yaml in the policy's
    directory, which training writes, or cor if there is none."""
    escape_untrusted: bool = False
    """Escape imitated delimiters, verdicts and control tokens in the texts of the pairs."""
    teacher: EndpointConfig | None = None
    """Endpoint of the teacher; give this or policy. A request that it refuses is no attempt, and the next run sends it
    again, unless accept_refusals is set."""
    policy: PolicyConfig | None = None
    """Model of this package as the teacher; give this or teacher."""
    second: EndpointConfig | None = None
    """Endpoint that corrects the wrong chains, given the right verdict. null: no second pass."""
    tries: PositiveInt = 1
    """Attempts of the teacher at a pair."""
    keep_thinking: bool = False
    """Keep the thought, before </think> or in a field of its own, as part of the chain."""
    budget_requests: PositiveInt | None = None
    """No request begins when `out` has used this many, over all runs. Retries after an error do not count."""
    budget_tokens: PositiveInt | None = None
    """No request begins when `out` has used this many tokens of prompts and answers, over all runs. Several processes
    divide what is left."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """If a row cannot be read: an error, or move it to OUT/rejects.jsonl."""
    seed: NonNegativeInt = 0
    """Seed of the order of chosen and rejected answers, where the rows give none."""

    def __post_init__(self):
        if (self.teacher is None) == (self.policy is None):
            raise InputError("give either teacher (an endpoint) or policy (a model of this package), and not both")
        if self.tries > 1 and (self.teacher or self.policy).temperature == 0:
            raise InputError(f"tries={self.tries} with temperature=0 would ask for the same text {self.tries} times")


class Teacher(Protocol):
    """Answers requests: an `Endpoint`, or a `PolicyTeacher`."""

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """Yield (key, answer) for each request, as the answers arrive."""

    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer, as plain values."""


def read_known_pairs(config: ChainsConfig) -> list[PreferencePair]:
    """Read the pairs, without ties. Raises InputError for a bad row, and for a pair whose better answer is not
    known."""
    rejects = Path(config.out) / "rejects.jsonl" if config.on_bad_row == "quarantine" else None
    if rejects:
        with writing(rejects):
            rejects.parent.mkdir(parents=True, exist_ok=True)
    read = list(read_pairs(config.pairs, seed=config.seed, rejects=rejects))
    pairs = [pair for pair in read if not pair.tie]
    if len(pairs) < len(read):
        print(f"{config.pairs}: {len(read) - len(pairs)} ties are left out", file=sys.stderr)
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
    """Ask for the chains that `config.out` lacks, and write the results. The pairs stay in memory. Returns the ledger,
    in which pairs are open if a budget ended the run.

    Raises:
        InputError: `config.out` was made with another config, or another run is using it; a teacher accepts no request
            (wrong key, no such model).
        RunError: the disk or a teacher fails. The answers so far are kept: the same command continues.
    """
    out = Path(config.out)
    answers = out / "answers.jsonl"
    prompt = dataclasses.replace(_prompt(config, teacher), escape_untrusted=config.escape_untrusted)
    turns = [(1, number) for number in range(config.tries)] + ([(2, 0)] if second else [])
    by_id = {pair.id: PairAttempts(pair, prompt.structure, turns, config.keep_thinking) for pair in pairs}
    rows = _shared_rows(answers, _settings(config, prompt, teacher, second), by_id)
    own = own_share(list(by_id.values()))
    with rows.open():
        budget = _Budget(config, by_id.values())
        unanswered: dict[str, Answer] = {}
        try:
            for turn in turns:
                waiting = [each for each in own if each.next_turn == turn]
                budget.divide()
                if waiting and not budget.spent:
                    requests = budget.limit(_request(each, prompt, turn) for each in waiting)
                    asked, asked_config = (teacher, config.teacher) if turn[0] == 1 else (second, config.second)
                    accept_refusals = asked_config is not None and asked_config.accept_refusals
                    arriving = asked.ask(requests)
                    title = f"pass {turn[0]}, try {turn[1] + 1}"
                    shown = {"total": len(waiting), "unit": "pair", "dynamic_ncols": True, "disable": not first()}
                    with tqdm(arriving, title, **shown) as bar:
                        unanswered |= _record(bar, turn, budget, rows, accept_refusals)
        except BaseException:
            if first():
                _write_results(out, by_id.values(), prompt)
            raise
        ledger = rows.finish(lambda: _write_results(out, by_id.values(), prompt))
    failures = [Unanswered("rmr1 data chains", own) for own in gather(unanswered) if own]
    from_first(functools.partial(Unanswered.check, failures))
    return ledger


def _prompt(config: ChainsConfig, teacher: Teacher) -> Prompt:
    """The prompt that is given, or the policy's own, or "cor"."""
    own = teacher.own_prompt if config.policy and config.prompt is None else None
    return own or get_prompt(config.prompt or "cor")


def _shared_rows(path: Path, settings: Mapping[str, Any], by_id: Mapping[str, PairAttempts]) -> SharedRows:
    """The file of answers. Each one's attempt is added to those at its pair."""

    def parse(row: dict[str, Any]) -> tuple[str, Attempt]:
        name, attempt = read_attempt(row)
        if name not in by_id:
            raise ValueError(f"there is no pair {name!r}")
        return name, attempt

    def add(found: tuple[str, Attempt]) -> None:
        by_id[found[0]].add(found[1])

    def key(found: tuple[str, Attempt]) -> tuple[str, Turn]:
        return found[0], found[1].turn

    return SharedRows(path, settings, parse=parse, add=add, key=key, command="rmr1 data chains")


def _record(
    arriving: Iterable[tuple[str, Answer]], turn: Turn, budget: _Budget, rows: SharedRows, accept_refusals: bool
) -> dict[str, Answer]:
    """Write each answer when it arrives. Returns {id: failure} of the pairs that the next run asks about again."""
    unanswered = {}
    for name, answer in arriving:
        if not answer.settles(accept_refusals):
            unanswered[name] = answer
            continue
        rows.append(attempt_row(name, Attempt(turn, answer)))
        budget.spend(answer)
    return unanswered


def _write_results(out: Path, attempts: Collection[PairAttempts], prompt: Prompt) -> Ledger:
    """Write chains.jsonl and ledger.json from all attempts."""
    ledger = make_ledger(attempts)
    write_whole(out / "chains.jsonl", (_row(each, prompt) for each in attempts if each.accepted))
    write_whole(out / "ledger.json", json.dumps(dataclasses.asdict(ledger), indent=2) + "\n")
    return ledger


class _Budget:
    """Limits the requests and tokens of all runs into one directory."""

    def __init__(self, config: ChainsConfig, earlier: Iterable[PairAttempts]):
        answers = [attempt.answer for each in earlier for attempt in each.attempts]
        self._earlier = len(answers), sum(answer.tokens for answer in answers)
        self._limits = config.budget_requests or math.inf, config.budget_tokens or math.inf
        self._most = 0.0, 0.0  # requests and tokens that this process may use in this run
        self._requests = self._tokens = 0  # used by this process in this run

    def divide(self) -> None:
        """Give this process its share of what all processes have left (a collective)."""
        index, count = this_process()
        used = [sum(column) for column in zip(self._earlier, *gather((self._requests, self._tokens)), strict=True)]
        requests, tokens = (limit - n for limit, n in zip(self._limits, used, strict=True))
        requests = requests if requests == math.inf else (requests + count - 1 - index) // count
        self._most = self._requests + requests, self._tokens + tokens / count

    @property
    def spent(self) -> bool:
        return self._requests >= self._most[0] or self._tokens >= self._most[1]

    def limit(self, requests: Iterable[Request]) -> Iterator[Request]:
        for request in requests:
            if self.spent:
                return
            self._requests += 1
            yield request

    def spend(self, answer: Answer) -> None:
        if self._limits[1] < math.inf and answer.text and not answer.tokens:
            raise RunError("the endpoint does not say how many tokens it used; set budget_requests, not budget_tokens")
        self._tokens += answer.tokens


def _request(each: PairAttempts, prompt: Prompt, turn: Turn) -> Request:
    messages = render_pair(prompt, each.pair)
    if turn[0] == 2:
        last = each.attempts[-1]
        chain = "" if last.answer.error else each.chain(last)
        messages = correction(messages, chain, each.pair.better, last.rejection.words)
    return Request(each.pair.id, messages, turn[1])


def _settings(config: ChainsConfig, prompt: Prompt, teacher: Teacher, second: Teacher | None) -> dict[str, Any]:
    """Everything that decides the chains; a run with other settings does not continue this one."""
    path = Path(config.pairs)
    note = correction([{"role": "user", "content": ""}], "chain", "A", "reason")
    note_digest = hashlib.sha256(json.dumps([note]).encode()).hexdigest()[:16]
    return {
        "pairs": f"{path.name} (sha256 {files_digest(source_files(path))})",
        "prompt": prompt.identity,
        **{name: getattr(config, name) for name in ("escape_untrusted", "seed", "tries", "keep_thinking")},
        "teacher": teacher.settings(),
        "second": {**second.settings(), "note": f"sha256 {note_digest}"} if second else None,
    }


def _row(each: PairAttempts, prompt: Prompt) -> str:
    row = {
        "id": each.pair.id,
        "source": str(each.pair.meta.get("source", "")),
        "context_messages": render_pair(prompt, each.pair),
        "winner": each.chain(each.accepted),
        "better": each.pair.better,
        "pass": each.accepted.turn[0],
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
