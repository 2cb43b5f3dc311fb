"""The small world: questions with two responses each, and the traces of an oracle and of a biased teacher.

The program generates everything from a seed, so that one can watch distillation and GRPO work within minutes on a
laptop. **Reasoning** questions ask to reverse three letters, rotate them or swap the first two, or to increase three
digits by one; the worse response makes a plausible mistake. **Chat** requests ask for a short message and name three of
four qualities that can be checked (greets by name, asks for the item, names the day, is polite); the worse response
misses exactly one of the three.

Every response starts with an opening of two tokens, confident or unsure. The better and the worse response have each
opening in exact quarters, so that it says nothing about which one is better. But the teacher favours confidence: where
only the worse response sounds confident (the *tempted* quarter), the teacher evaluates both correctly, notes how they
sound, and then often prefers the worse one. A verifiable reward can correct that; more data of the same teacher cannot.

A hash of its content decides whether a question belongs to `sft`, `grpo`, `dev` or `test`, regardless of the seed, so
that no question is in two splits. Within a split a question may come again with another pair of answers.
Read next: `tokenizer.py` (its tokenizer), `quickstart.py` (the run).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.prompt import Messages, Prompt, published_frames
from rmr1_jax.prompts.verdict import other_side
from rmr1_jax.quickstart.cases import CHAT, REASONING, Case, pick

SPLITS = {"sft": 0.5, "grpo": 0.3, "dev": 0.1, "test": 0.1}  # each split's share of all questions
KINDS = ("reasoning", "chat")
SYSTEM = "Judge by <type>."  # the tag that it names says which structure a trace must have (`Prompt.structure`)
WEIGHTS = (3, 2, 1)  # of the qualities, in the order in which a request names them
CONFIDENT = ("Surely! ", "Certainly! ")
UNSURE = ("Maybe! ", "Perhaps! ")  # as many tokens as the confident ones
TEACHER_BIAS = 0.75  # probability that the teacher names the worse response where it is tempted


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of the small world with its two responses.

    `task` is what the question asks to do (Reasoning) or the quality that the worse response misses (Chat). `tempted`
    says that the worse response has a confident opening and the better one does not. The last four fields are known to
    the oracle only: the worked `solution` (Reasoning), the `rubric` of (quality, wanted word) pairs (Chat), and what
    each response says: its answer, one string (Reasoning), or its word for every rubric item (Chat).
    """

    id: str
    kind: str  # "reasoning" | "chat"
    task: str
    question: str
    response_a: str
    response_b: str
    better: str  # "A" | "B"
    tempted: bool
    solution: str
    rubric: tuple[tuple[str, str], ...]
    found_a: tuple[str, ...]
    found_b: tuple[str, ...]


def make_items(n: int, *, split: str, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Item]:
    """Make n items of one split in a seeded order: as many of each kind, and every pair of answers once.

    Within a kind the better response is A in half of the items, and within each half the openings of the better and of
    the worse response are confident or unsure in equal quarters (exactly where n is a multiple of 8 * len(kinds), to
    within one item otherwise).

    Raises:
      InputError: an unknown split or kind, or more items than the split has pairs.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds={kinds!r}: expected some of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    items = []
    for k, kind in enumerate(kinds):
        count = n // len(kinds) + (k < n % len(kinds))
        items += _items_of_kind(kind, count, split, seed, rng)
    return [items[i] for i in rng.permutation(len(items))]


def split_of(key: str) -> str:
    """The split of a question, decided by a hash of its content (`Case.key`)."""
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        position -= share
        if position < 0:
            return split
    return split


def oracle_trace(item: Item) -> str:
    """The full trace of a judge that evaluates and decides correctly."""
    return _trace(item, item.better)


def teacher_trace(item: Item, *, seed: int = 0, bias: float = TEACHER_BIAS) -> str:
    """The trace of the biased teacher: a correct evaluation, but on a tempted item often the wrong verdict.

    On a tempted item the verdict names the worse response with probability `bias`; the choice depends on
    (seed, item.id) alone. On every other item this is the oracle's trace.
    """
    digest = hashlib.sha256(f"teacher {seed} {item.id}".encode()).digest()
    errs = item.tempted and int.from_bytes(digest[:8], "big") < bias * 2**64
    return _trace(item, other_side(item.better) if errs else item.better)


def world_prompt() -> Prompt:
    """The judge's prompt in the small world: one line of system text and the published delimiters."""
    single_turn, multi_turn = published_frames()
    return Prompt(name="small-world", system=SYSTEM, single_turn=single_turn, multi_turn=multi_turn)


def world_texts(n: int = 2000, *, seed: int = 0) -> list[str]:
    """Texts to train the tokenizer on: the parts of the prompts and traces of n SFT items."""
    items = make_items(n, split="sft", seed=seed)
    return [SYSTEM, SYSTEM, *(t for i in items for t in (i.question, i.response_a, i.response_b, oracle_trace(i)))]


def to_pair(item: Item) -> PreferencePair:
    """Converts an item to a preference pair with the same A/B order."""
    return PreferencePair.from_answers(item.id, item.question, item.response_a, item.response_b, better=item.better)


def render(item: Item) -> Messages:
    """The messages that ask for a verdict on an item."""
    return world_prompt().render(item.question, item.response_a, item.response_b)


# Items: cases with openings, in an A/B order.


def _items_of_kind(kind: str, count: int, split: str, seed: int, rng: np.random.Generator) -> list[Item]:
    makers = REASONING if kind == "reasoning" else CHAT
    tasks = list(makers)
    # One permutation decides the A/B order and the openings, another one the task: they are independent.
    cells, turns = rng.permutation(count), rng.permutation(count)
    items: list[Item] = []
    seen: set[str] = set()
    for i in range(count):
        task = tasks[turns[i] % len(tasks)]
        case = _new_case(makers[task], split, seen, rng)
        cell = int(cells[i])
        a_is_better, better_confident, worse_confident = not cell % 2, bool(cell // 2 % 2), bool(cell // 4 % 2)
        better = pick(rng, CONFIDENT if better_confident else UNSURE) + case.better
        worse = pick(rng, CONFIDENT if worse_confident else UNSURE) + case.worse
        items.append(
            Item(
                id=f"{split}-{seed}-{kind}-{i:05d}",
                kind=kind,
                task=task,
                question=case.question,
                response_a=better if a_is_better else worse,
                response_b=worse if a_is_better else better,
                better="A" if a_is_better else "B",
                tempted=worse_confident and not better_confident,
                solution=case.solution,
                rubric=case.rubric,
                found_a=case.found_better if a_is_better else case.found_worse,
                found_b=case.found_worse if a_is_better else case.found_better,
            )
        )
    return items


def _new_case(maker: Callable, split: str, seen: set[str], rng: np.random.Generator) -> Case:
    for _ in range(2000):
        case = maker(rng)
        pair = f"{case.key} {case.better} {case.worse}"
        if pair not in seen and split_of(case.key) == split:
            seen.add(pair)
            return case
    raise InputError(f"split {split!r} has no unused pair of this task after {len(seen)}; ask for fewer items")


# Traces. Every wanted word stands next to the word that the response has, followed by yes or no, because a small policy
# compares neighbouring tokens well. A summary adds the yes and no up, and the verdict follows from the summaries.


def _trace(item: Item, verdict: str) -> str:
    body = _reasoning_body(item) if item.kind == "reasoning" else _chat_body(item)
    return f"<type>{item.kind.capitalize()}</type>\n{body}</eval>\n<answer>[[{verdict}]]</answer>"


def _reasoning_body(item: Item) -> str:
    answer = item.solution.rsplit(" gives ")[-1]
    evaluation = ""
    for side, found in (("A", item.found_a), ("B", item.found_b)):
        checks = "".join(_check(*words) for words in zip(answer.split(), found[0].split(), strict=True))
        verdict = "right" if found[0] == answer else "wrong"
        evaluation += f"<quote_{side}> {found[0]}</quote_{side}>{_summary(item, side, f'{checks} {verdict}')}"
    return f"<solution> {item.solution}</solution>\n<eval>{evaluation}"


def _chat_body(item: Item) -> str:
    rubric = ",".join(f" {quality} {weight}" for (quality, _), weight in zip(item.rubric, WEIGHTS, strict=True))
    checks, score = "", {"A": 0, "B": 0}
    for (quality, word), weight, a, b in zip(item.rubric, WEIGHTS, item.found_a, item.found_b, strict=True):
        checks += f" {quality}"
        for side, found in (("A", a), ("B", b)):
            checks += f"<quote_{side}> {found}</quote_{side}>{_check(word, found)}"
            score[side] += weight * (found == word)
    scores = "".join(_summary(item, side, f" {score[side]}") for side in "AB")
    return f"<rubric>{rubric}<justify> as asked</justify></rubric>\n<eval>{checks}{scores}"


def _summary(item: Item, side: str, findings: str) -> str:
    """The findings about one side, and then its opening word: how it sounds."""
    response = item.response_a if side == "A" else item.response_b
    return f"<summary_{side}>{findings} {response[: response.index('!')]}</summary_{side}>"


def _check(wanted: str, found: str) -> str:
    """One comparison, always in the same form: the wanted word, the word found, whether they are equal."""
    return f" {wanted} {found} {'yes' if found == wanted else 'no'}"
