"""The small world: questions, two responses each, and the traces of an oracle and of a teacher with shallow tastes.

Everything here is made by the program from a seed, so that distillation and GRPO can be seen to work within minutes on
a laptop. **Reasoning** questions ask to reverse three letters, rotate them or swap the first two, or to increase three
digits by one, and have one right answer; the worse response carries a plausible slip. **Chat** requests ask for a short
message and name three of four qualities that can be checked (greets by name, asks for the item, names the day, is
polite); the worse response misses exactly one of the three.

Every response is also dressed with an opening of two tokens, confident or unsure, the better and the worse one alike,
in exact quarters. Dress says nothing about which response is better, but the teacher likes confidence: where only the
worse response has it (the *tempted* quarter), the teacher evaluates rightly, notes how both sound, and then often names
the worse one. A verifiable reward can correct that; more of the same teacher cannot.

Whether a question belongs to `sft`, `grpo`, `dev` or `test` is decided by a hash of its content, whatever the seed: no
question can be in two splits. Within a split a question may come again with another pair of answers. Read next:
`world_tokenizer.py` (its tokenizer), `quickstart.py` (the run).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.prompt import Prompt, published_frames
from rmr1_jax.quickstart.cases import CHAT, REASONING, Case, pick

SPLITS = {"sft": 0.5, "grpo": 0.3, "dev": 0.1, "test": 0.1}  # share of all questions that a split owns


KINDS = ("reasoning", "chat")


SYSTEM = "Judge by <type>."  # naming the tag says which structure a trace must have (`Prompt.structure`)

WEIGHTS = (3, 2, 1)  # what the request names first weighs most

CONFIDENT = ("Surely! ", "Certainly! ")


UNSURE = ("Maybe! ", "Perhaps! ")  # as many tokens, so that length tells nothing

SHALLOW = 0.75  # how often the teacher's verdict follows its liking, where it is tempted


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of the small world with its two responses.

    `task` is what the question asks to do (Reasoning) or the quality that the worse response misses (Chat). `tempted`
    says that the worse response is dressed as the teacher likes and the better one is not. The last four fields are the
    oracle's knowledge: the worked `solution` (Reasoning), the `rubric` of (quality, wanted word) (Chat), and what each
    response says: its answer, one string (Reasoning), or its word for every rubric item (Chat).
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
    """Make n items of one split: as many of each kind, no question with the same two answers twice, in a seeded order.

    Within a kind the better response is A in half of the items, and within each half the better and the worse response
    are dressed confident or unsure in equal quarters (exact when n is a multiple of 8 * len(kinds), to within one item
    otherwise).

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
    """The split that owns a question of this content: a hash of the content, not of any seed."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        place -= share
        if place < 0:
            return split
    return split


def oracle_trace(item: Item) -> str:
    """The full trace of a judge that evaluates and decides rightly."""
    return _trace(item, item.better)


def teacher_trace(item: Item, *, seed: int = 0, shallow: float = SHALLOW) -> str:
    """The trace of a teacher with shallow tastes: a right evaluation, but a verdict that follows dress when tempted.

    On a tempted item the verdict names the worse response with probability `shallow`; the choice depends on
    (seed, item.id) alone. On every other item this is the oracle's trace.
    """
    digest = hashlib.sha256(f"teacher {seed} {item.id}".encode()).digest()
    follows = item.tempted and int.from_bytes(digest[:8], "big") < shallow * 2**64
    return _trace(item, _other(item.better) if follows else item.better)


def world_prompt() -> Prompt:
    """The judge's prompt in the small world: one line of system text and the published delimiters."""
    single_turn, multi_turn = published_frames()
    return Prompt(name="small-world", system=SYSTEM, single_turn=single_turn, multi_turn=multi_turn)


def world_texts(n: int = 2000, *, seed: int = 0) -> list[str]:
    """Texts to train the tokenizer on: what the prompts and traces of n distillation items are made of."""
    items = make_items(n, split="sft", seed=seed)
    return [SYSTEM, SYSTEM, *(t for i in items for t in (i.question, i.response_a, i.response_b, oracle_trace(i)))]


def to_pair(item: Item) -> PreferencePair:
    """The item as a preference pair, its A/B order kept."""
    return PreferencePair.from_answers(
        id=item.id,
        question=item.question,
        response_a=item.response_a,
        response_b=item.response_b,
        better=item.better,
    )


# Items: a case, dressed and placed.


def _items_of_kind(kind: str, count: int, split: str, seed: int, rng: np.random.Generator) -> list[Item]:
    makers = REASONING if kind == "reasoning" else CHAT
    tasks = list(makers)
    # Place and dress come from one exact table and the task from another permutation, so that neither tells the other.
    cells, turns = rng.permutation(count), rng.permutation(count)
    items: list[Item] = []
    seen: set[str] = set()
    for i in range(count):
        task = tasks[turns[i] % len(tasks)]
        case = _new_case(makers[task], split, seen, rng)
        cell = int(cells[i])
        place, dress_better, dress_worse = "AB"[cell % 2], bool(cell // 2 % 2), bool(cell // 4 % 2)
        better = _dress(case.better, dress_better, rng)
        worse = _dress(case.worse, dress_worse, rng)
        a_is_better = place == "A"
        items.append(
            Item(
                id=f"{split}-{seed}-{kind}-{i:05d}",
                kind=kind,
                task=task,
                question=case.question,
                response_a=better if a_is_better else worse,
                response_b=worse if a_is_better else better,
                better=place,
                tempted=dress_worse and not dress_better,
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


def _dress(text: str, liked: bool, rng: np.random.Generator) -> str:
    """With the opening that the teacher likes, or with another."""
    return pick(rng, CONFIDENT if liked else UNSURE) + text


# Traces: every word that is wanted stands next to the word that is said, with yes or no after them, because a small
# policy compares neighbours well. A summary adds the yes and no up, and the verdict follows the summaries.


def _trace(item: Item, verdict: str) -> str:
    body = _reasoning_body(item) if item.kind == "reasoning" else _chat_body(item)
    return f"<type>{item.kind.capitalize()}</type>\n{body}</eval>\n<answer>[[{verdict}]]</answer>"


def _reasoning_body(item: Item) -> str:
    answer = item.solution.rsplit(" gives ")[-1]
    eval_ = ""
    for side, found in (("A", item.found_a), ("B", item.found_b)):
        checks = "".join(_check(*pair) for pair in zip(answer.split(), found[0].split(), strict=True))
        verdict = "right" if found[0] == answer else "wrong"
        eval_ += f"<quote_{side}> {found[0]}</quote_{side}>{_summary(item, side, f'{checks} {verdict}')}"
    return f"<solution> {item.solution}</solution>\n<eval>{eval_}"


def _chat_body(item: Item) -> str:
    rubric = ",".join(f" {quality} {weight}" for (quality, _), weight in zip(item.rubric, WEIGHTS, strict=True))
    checks, score = "", {"A": 0, "B": 0}
    for (quality, word), weight, a, b in zip(item.rubric, WEIGHTS, item.found_a, item.found_b, strict=True):
        checks += f" {quality}"
        for side, said in (("A", a), ("B", b)):
            checks += f"<quote_{side}> {said}</quote_{side}>{_check(word, said)}"
            score[side] += weight * (said == word)
    scores = "".join(_summary(item, side, f" {score[side]}") for side in "AB")
    return f"<rubric>{rubric}<justify> as asked</justify></rubric>\n<eval>{checks}{scores}"


def _summary(item: Item, side: str, findings: str) -> str:
    """What was found on one side, and then how it sounds: its opening word."""
    response = item.response_a if side == "A" else item.response_b
    return f"<summary_{side}>{findings} {response[: response.index('!')]}</summary_{side}>"


def _check(wanted: str, said: str) -> str:
    """One comparison, in the same form everywhere: what is wanted, what is said, whether they agree."""
    return f" {wanted} {said} {'yes' if said == wanted else 'no'}"


# Small words.


def _other(side: str) -> str:
    return "B" if side == "A" else "A"
