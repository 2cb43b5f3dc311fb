"""Tests of forced verdicts against the policy's own logits after the same tokens, and of the curve."""

import json

import numpy as np
import pytest
from policies import tiny_policy

from rmr1_jax.errors import InputError
from rmr1_jax.eval.forced import CLOSE, ENDING, force_verdicts
from rmr1_jax.eval.summary import write_summary
from rmr1_jax.judge.file import Output, judge_file
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import Voting
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.prompt import Prompt

PROMPT = Prompt(name="short", system=None, single_turn=("", "\nA: ", "\nB: ", "\nWhich?"), multi_turn=("", "\n", ""))
PAIRS = [
    PreferencePair.from_answers(
        str(k), f"name {k}", "wren owl", "owl wren", better="AB"[k % 2], meta={"benchmark": "x", "subset": "y"}
    )
    for k in range(6)
]
BUDGETS = (4, 12, 512)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(judge, directory of a run): texts of a policy with random weights, 20 tokens each unless they stop."""
    out = tmp_path_factory.mktemp("run")
    judge = Judge(tiny_policy(), PROMPT, rule="strict", max_new_tokens=20, escape_untrusted=False)
    output = Output(path=out / "judgements.jsonl", row_of=judgement_row)
    judge_file(judge, PAIRS, output, Voting(both_orders=True))
    force_verdicts(judge, out, budgets=BUDGETS, batch_tokens=1024, progress=False)
    return judge, out


def rows_of(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_a_forced_verdict_is_the_likelier_of_the_two_endings(run):
    """All tokens of both endings scored by the policy itself, in one row each: the sums are compared."""
    judge, out = run
    tokenizer, policy = judge.policy.tokenizer, judge.policy
    forced, checked = rows_of(out / "forced.jsonl"), []
    for pair in PAIRS:
        row = rows_of(out / "judgements.jsonl")[pair.id]
        for order, shown in enumerate((pair, pair.swapped())):
            prompt = tokenizer.render(render_pair(PROMPT, shown))
            for budget in BUDGETS[:2]:
                if row["tokens"][order][0] <= budget:
                    continue
                begun = tokenizer.encode(row["texts"][order][0])[:budget]
                ends = [tokenizer.encode(f"{ENDING}{x}]]</answer>") for x in "AB"]
                first = next(k for k, (a, b) in enumerate(zip(*ends, strict=False)) if a != b)
                tokens = np.array([prompt + begun + ends[0][:first]], np.int32)
                logits = np.asarray(policy.logits(tokens))[0, -1]
                gap = logits[ends[0][first]] - logits[ends[1][first]]
                if abs(gap) > 1e-4:
                    wanted = "AB"[int((gap < 0) != bool(order))]
                    assert forced[pair.id]["verdicts"][str(budget)][order] == [wanted]
                    checked.append(wanted)
    assert len(checked) >= 12 and set(checked) == {"A", "B"}


def test_whole_texts_keep_their_verdict(run):
    _, out = run
    judged, forced = rows_of(out / "judgements.jsonl"), rows_of(out / "forced.jsonl")
    assert forced.keys() <= judged.keys()
    for id, row in forced.items():
        assert row["verdicts"]["512"] == judged[id]["verdicts"]


def test_the_summary_has_both_curves(run, monkeypatch):
    _, out = run
    monkeypatch.setattr("rmr1_jax.eval.lenses.BUDGETS", BUDGETS)
    found = json.loads(write_summary(out, {}).read_text())
    plain, forced = found["budget"], found["budget_forced"]
    assert [line["tokens"] for line in forced] == [4, 12, 20]  # the last is the run's own limit
    assert plain[0]["truncated"] == forced[0]["truncated"] > 0
    assert plain[0]["invalid"] == 6 > forced[0]["invalid"] == 0
    # By hand, from the forced verdicts: right where one order names the better answer and the other does not object.
    rows, right = rows_of(out / "forced.jsonl"), 0
    for pair in PAIRS:
        named = {v for order in rows[pair.id]["verdicts"]["4"] for v in order}
        right += named == {pair.better}
    assert forced[0]["accuracy"] == pytest.approx(100 * right / 6)
    assert any(note.endswith("the likelier verdict") for note in found["notes"])


def test_a_killed_run_goes_on_and_other_judgements_are_refused(run, tmp_path):
    judge, out = run
    for name in ("judgements.jsonl", "judgements.jsonl.run.json", "forced.jsonl.run.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    lines = (out / "forced.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "forced.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    force_verdicts(judge, tmp_path, budgets=BUDGETS, batch_tokens=1024, progress=False)
    assert rows_of(tmp_path / "forced.jsonl") == rows_of(out / "forced.jsonl")
    with pytest.raises(InputError, match="budgets"):
        force_verdicts(judge, tmp_path, budgets=(4,), progress=False)


class Spelling(Tokenizer):
    """A tokenizer of letters whose text is thought, up to `</think>`: enough to see what is written after a cut."""

    __init__ = object.__init__
    encode_trace = staticmethod(lambda text: list(text.encode()))
    decode = staticmethod(lambda ids: bytes(ids).decode())
    render = staticmethod(lambda messages: list(b"prompt<think>"))


@pytest.mark.parametrize(
    ("budget", "closed"), [(5, False), (len("hm hm</think>"), True), (len("hm hm</think>\nso"), True)]
)
def test_an_open_thought_is_closed_before_the_answer(budget, closed):
    from types import SimpleNamespace

    from rmr1_jax.eval.forced import _Question, _questions

    text = "<think>\nhm hm</think>\nso it is <answer>[[A]]</answer>"
    policy = SimpleNamespace(tokenizer=Spelling(), config=SimpleNamespace(max_length=1000))
    judge = SimpleNamespace(
        policy=policy,
        rule="eval",
        prompt=PROMPT,
    )
    row = {"id": "1", "better": "A", "question": "q", "response_a": "a", "response_b": "b", "tokens": [[60]]}
    row |= {"texts": [[text]], "verdicts": [["A"]]}
    (question,) = _questions(judge, row, 0, [budget])
    assert isinstance(question, _Question) and question.choices == (ord("A"), ord("B"))
    wanted = "prompt<think>" + text.removeprefix("<think>\n")[:budget] + ("" if closed else CLOSE) + ENDING
    assert bytes(question.tokens).decode() == wanted
    # A cut behind the verdict needs no question.
    assert list(_questions(judge, row, 0, [50])) == [((0, "50", 0, 0), "A")]
