"""Tests of judge_file: every pair gets one row after any interruption, and other settings do not continue a file."""

import errno
import json
import os

import pytest
from policies import ScriptedPolicy, answer, prefers, says
from threads import Threads

from rmr1_jax.distributed import rows as rows_module
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import files_digest
from rmr1_jax.judge import file as file_module
from rmr1_jax.judge.file import Output, judge_file, put_in_order
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import Judgement, Voting
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.judge.summary import Summary
from rmr1_jax.pairs.pair import PreferencePair

PAIRS = [
    PreferencePair.from_answers("five-a", "2 + 3?", "five", "six", better="A"),
    PreferencePair.from_answers("five-b", "2 + 3?", "six", "five", better="B"),
    PreferencePair.from_answers("none", "2 + 3?", "", " ", better="A"),
    PreferencePair.from_answers("wrong", "2 + 2?", "five", "four", better="B"),
    PreferencePair.from_answers("unknown", "2 + 3?", "füünf", "five"),
    PreferencePair.from_answers("long", "2 + 3?", "five", "x" * 30_000, better="A"),
    PreferencePair.from_answers("five-c", "3 + 2?", "five", "six", better="A"),
]
IDS = [pair.id for pair in PAIRS]


def judge_pairs(output, pairs=PAIRS, policy=None, batch_size=3, **options):
    judge = Judge(policy or ScriptedPolicy(prefers("five")))
    output = Output(path=output, identity=options.pop("identity", {}))
    return judge_file(judge, pairs, output, Voting(**options), batch_size=batch_size)


def rows(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_pair_gets_its_row(tmp_path):
    output = tmp_path / "new" / "verdicts.jsonl"
    summary = judge_pairs(output, iter(PAIRS))
    found = rows(output)
    assert [row["id"] for row in found] == IDS
    assert found[1] == {
        "id": "five-b",
        "winner": "B",
        "status": "ok",
        "votes": {"A": 0, "B": 1, "invalid": 0},
        "text": "<eval>because</eval>\n<answer>[[B]]</answer>",
        "correct": True,
        "better": "B",
        "question": "2 + 3?",
        "response_a": "six",
        "response_b": "five",
        "tokens": [[len(answer("B"))]],
        "finish_reasons": [["stop"]],
    }
    assert found[2] == {
        "id": "none",
        "winner": None,
        "status": "tie",
        "votes": {"A": 0, "B": 0, "invalid": 0},
        "text": "",
        "correct": False,
        "better": "A",
        "question": "2 + 3?",
        "response_a": "",
        "response_b": " ",
        "note": "both answers are empty",
    }
    assert {"note", "prompt_tokens"} < found[5].keys() and found[5]["prompt_tokens"] > 30_000
    assert [row.get("correct") for row in found] == [True, True, False, False, None, False, True]
    assert [row["status"] for row in found] == ["ok", "ok", "tie", "ok", "ok", "too_long", "ok"]
    assert summary == Summary(ok=5, tie=1, invalid=0, too_long=1, known=6, correct=3, longest=found[5]["prompt_tokens"])
    assert str(summary) == "7 pairs: 71.4% ok, 14.3% tie, 0.0% invalid, 14.3% too long; accuracy 50.0% of 6"


def test_the_summary_without_pairs_or_known_answers(tmp_path):
    assert str(judge_pairs(tmp_path / "a.jsonl", [])) == "no pairs"
    assert str(judge_pairs(tmp_path / "b.jsonl", PAIRS[4:5])).endswith("; accuracy not known")


def test_a_truncated_file_is_continued_to_the_same_bytes(tmp_path):
    whole = tmp_path / "whole.jsonl"
    summary = judge_pairs(whole)
    text = whole.read_bytes()
    ends = [k + 1 for k, byte in enumerate(text) if byte == ord("\n")]
    cuts = {0, 1, len(text), len(text) - 1, *ends, *(end + 10 for end in ends[:-1]), *(end - 1 for end in ends)}
    for cut in sorted(cuts):
        output = tmp_path / f"cut{cut}.jsonl"
        output.write_bytes(text[:cut])
        (tmp_path / f"{output.name}.run.json").write_bytes((tmp_path / "whole.jsonl.run.json").read_bytes())
        policy = ScriptedPolicy(prefers("five"))
        assert judge_pairs(output, policy=policy) == summary
        assert output.read_bytes() == text, cut
        kept = sum(end <= cut for end in ends)
        batches_left = 3 - kept // 3 if kept < len(PAIRS) else 0
        assert len(policy.calls) == batches_left, cut  # what is there is not asked again


@pytest.mark.parametrize("texts", range(5))
def test_a_killed_run_keeps_every_row_and_is_continued(tmp_path, texts):
    output = tmp_path / "verdicts.jsonl"
    policy = ScriptedPolicy(prefers("five"))
    stream, written = policy.stream, []

    def dies(*args, **options):
        for found in stream(*args, **options):
            if len(written) == texts:
                raise KeyboardInterrupt
            written.append(found)
            yield found

    policy.stream = dies
    with pytest.raises(KeyboardInterrupt):
        judge_pairs(output, policy=policy)
    # Each was written before the next was made; what is not asked comes first in its batch of three.
    finished = ["five-a", "five-b", "wrong", "unknown", "five-c"]
    assert [row["id"] for row in rows(output) if row["id"] in finished] == finished[:texts]
    assert rows(output)[0]["id"] == "none"
    judge_pairs(output)
    judge_pairs(tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_interrupted_batch_is_judged_as_a_whole_only_if_bits_depend_on_it(tmp_path):
    for whole, lengths in ((True, [2, 2]), (False, [1, 2])):
        output = tmp_path / f"{whole}.jsonl"
        judge_pairs(output, PAIRS[:1])
        policy = ScriptedPolicy(prefers("five"))
        judge = Judge(policy)
        judge.whole_batches = whole
        judge_file(judge, [PAIRS[k] for k in (0, 1, 3, 4)], Output(path=output), batch_size=2)
        assert [len(prompts) for prompts, _ in policy.calls] == lengths
        assert [row["id"] for row in rows(output)] == ["five-a", "five-b", "wrong", "unknown"]


def test_more_pairs_can_follow(tmp_path):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output, PAIRS[:4])
    assert judge_pairs(output).pairs == 7
    assert [row["id"] for row in rows(output)] == IDS


def test_other_settings_are_refused_with_the_difference(tmp_path):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output, identity={"model": "a"})
    before = output.read_bytes()
    with pytest.raises(InputError) as caught:
        judge_pairs(output, policy=ScriptedPolicy(says("AAA")), votes=3, both_orders=True, identity={"model": "b"})
    message = str(caught.value)
    assert f"{output} was made with other settings (" in message
    for difference in (
        "model was 'a', is 'b'",
        "votes was 1, is 3",
        "both_orders was False, is True",
        "temperature was 0.0, is 1.0",
    ):
        assert difference in message
    assert "seed" not in message
    assert output.read_bytes() == before
    judge_pairs(output, identity={"model": "a"}, batch_size=2)  # how many at a time is not a setting


def test_another_prompt_of_the_same_name_is_another_setting(tmp_path):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output)
    path = tmp_path / "cor.yaml"
    path.write_text(
        "name: cor\nsystem: null\nsingle_turn: '{question}{response_a}{response_b}'\n"
        "multi_turn: '{conversation_a}{conversation_b}'\n"
    )
    with pytest.raises(InputError, match=r"prompt was 'cor \(sha256 .*', is 'cor \(sha256"):
        judge_file(Judge(ScriptedPolicy(says("A")), path), PAIRS, Output(path=output))


def test_settings_of_a_run_without_rows_may_change(tmp_path):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output, [], seed=1)
    output.write_bytes(b'{"id": "fi')
    assert judge_pairs(output, seed=2).pairs == 7


def test_a_file_without_settings_is_not_touched(tmp_path):
    output = tmp_path / "notes.txt"
    output.write_text("my notes, without a line break")
    with pytest.raises(InputError, match=r"notes\.txt exists, but not notes\.txt\.run\.json beside it"):
        judge_pairs(output)
    assert output.read_text() == "my notes, without a line break"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "Expecting value"),
        ('{"winner": "A"}', "'id'"),
        ("[1]", "list indices"),
        ('{"id": "five-b", "status": "fine"}', "status 'fine'"),
        ('{"id": "five-a", "status": "ok"}', "id 'five-a' for the second time"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output, PAIRS[:1])
    spoilt = output.read_text() + line + "\n"
    output.write_text(spoilt)
    with pytest.raises(InputError, match=rf"verdicts\.jsonl:2: not a row of `rmr1 judge` \(.*{reason}"):
        judge_pairs(output)
    assert output.read_text() == spoilt


def test_malformed_settings_are_named(tmp_path):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output)
    for text in ("{", "[]"):
        (tmp_path / "verdicts.jsonl.run.json").write_text(text)
        with pytest.raises(InputError, match=r"verdicts\.jsonl\.run\.json: not the settings"):
            judge_pairs(output)


def test_two_pairs_of_one_id_are_refused(tmp_path):
    with pytest.raises(InputError, match="two pairs have the id 'five-a'"):
        judge_pairs(tmp_path / "verdicts.jsonl", [*PAIRS, PAIRS[0]])


def test_a_second_run_on_the_same_file_is_refused(tmp_path):
    output = tmp_path / "verdicts.jsonl"

    def pairs():
        yield PAIRS[0]
        with pytest.raises(InputError, match=r"verdicts\.jsonl: another run is writing it"):
            judge_pairs(output)
        yield PAIRS[1]

    assert judge_pairs(output, pairs()).pairs == 2
    assert judge_pairs(output).pairs == 7


def test_a_full_disk_stops_the_run_and_the_next_one_continues(tmp_path, monkeypatch):
    output = tmp_path / "verdicts.jsonl"
    judge_pairs(output, PAIRS[:3])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device .*; the rows written so far stand"):
            judge_pairs(output)
    judge_pairs(output)
    assert [row["id"] for row in rows(output)] == IDS


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: .*; give an output that can be read and written"):
        judge_pairs(tmp_path / "file" / "verdicts.jsonl")
    with pytest.raises(InputError, match="batch_size=0 must be at least 1"):
        judge_pairs(tmp_path / "verdicts.jsonl", batch_size=0)


def test_a_judgement_row_holds_the_pair_and_the_judgement(tmp_path):
    pair = PreferencePair.from_answers("five-b", "2 + 3?", "six", "five", better="B", meta={"subset": "sums"})
    talk = [("user", "hi"), ("assistant", "hello"), ("user", "2 + 3?")]
    longer = PreferencePair.from_preference(
        "t", [*talk, ("assistant", "five")], [*talk, ("assistant", "six")], chosen_in_b=False
    )
    output = tmp_path / "judgements.jsonl"
    judge = Judge(ScriptedPolicy(prefers("five")))
    empty = PreferencePair.from_answers("none", "2 + 3?", "", " ", better="A")
    judge_file(
        judge, [pair, longer, empty], Output(path=output, row_of=judgement_row), Voting(votes=2, both_orders=True)
    )
    single, several, nothing = rows(output)
    assert single == {
        "id": "five-b",
        "better": "B",
        "winner": "B",
        "status": "ok",
        "correct": True,
        "votes": {"A": 0, "B": 4, "invalid": 0},
        "question": "2 + 3?",
        "response_a": "six",
        "response_b": "five",
        "meta": {"subset": "sums"},
        "kind": None,
        "texts": [[answer("B")] * 2, [answer("A")] * 2],
        "verdicts": [["B", "B"], ["B", "B"]],
        "tokens": [[len(answer("A"))] * 2] * 2,
        "finish_reasons": [["stop"] * 2] * 2,
    }
    assert several["conversation_a"][-1] == {"role": "assistant", "content": "five"}
    assert several["conversation_b"][0] == {"role": "user", "content": "hi"} and "question" not in several
    assert (nothing["texts"], nothing["verdicts"], nothing["tokens"]) == ([], [], [])
    assert nothing["note"] == "both answers are empty" and nothing["correct"] is False


def test_a_judge_without_texts_writes_its_scores(tmp_path):
    class ByLength:
        whole_batches = False

        def stream(self, pairs, voting):
            for number, pair in reversed(list(enumerate(pairs))):
                scores = (float(len(pair.response_a)), float(len(pair.response_b)))
                winner = "A" if scores[0] > scores[1] else "B"
                votes = {"A": 0, "B": 0, "invalid": 0} | {winner: 1}
                yield number, Judgement(winner=winner, status="ok", votes=votes, scores=scores)

        def settings(self, voting):
            return {"judge": "by length"}

    output = tmp_path / "judgements.jsonl"
    judge_file(ByLength(), PAIRS[:2], Output(path=output, row_of=judgement_row))
    assert [(row["id"], row["winner"], row["scores"]) for row in rows(output)] == [
        ("five-a", "A", [4.0, 3.0]),
        ("five-b", "B", [3.0, 4.0]),
    ]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_processes_write_the_file_of_one_and_keep_items_whole(tmp_path, monkeypatch, count):
    """Threads stand for the processes. In a batch of 14 there are 14 pairs of all processes together."""
    pairs = [
        PreferencePair.from_answers(f"{k}/{j}", f"{k}?", "five", "six", better="A", meta={"item": k} if k < 3 else {})
        for k in range(12)
        for j in range(9 if k < 3 else 1)
    ]
    summary = judge_pairs(tmp_path / "one.jsonl", pairs)
    policies = [ScriptedPolicy(prefers("five")) for _ in range(count)]

    def process(index):
        return judge_pairs(tmp_path / "several.jsonl", iter(pairs), policies[index], batch_size=14)

    assert Threads(monkeypatch, count, rows_module, file_module).run(process) == [summary] * count
    assert (tmp_path / "several.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    for index, policy in enumerate(policies):
        asked = [policy.decode(prompt) for prompts, _ in policy.calls for prompt in prompts]
        expected = [pair.question for k in range(index, 12, count) for pair in pairs if pair.id.startswith(f"{k}/")]
        assert [next(q for q in reversed(expected) if q in text) for text in asked] == expected
        assert all(len(prompts) <= -(-14 // count) for prompts, _ in policy.calls)


def test_rows_are_put_in_order(tmp_path):
    path = tmp_path / "judgements.jsonl"
    lines = [json.dumps({"id": str(k), "meta": {"number": k}, "text": "é\n" * k}) + "\n" for k in range(4)]
    path.write_text("".join(lines[k] for k in (3, 0, 2, 1)))
    put_in_order(path, lambda row: row["meta"]["number"])
    assert path.read_text() == "".join(lines)
    before = path.stat().st_mtime_ns
    put_in_order(path, lambda row: row["meta"]["number"])
    assert path.stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 1


def test_the_digest_tells_files_apart(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytes(range(256)) * 20_000
    one.write_bytes(content)
    first = files_digest([one])
    assert first == files_digest([one]) and len(first) == 16
    one.write_bytes(content[:-1])
    assert files_digest([one]) != first
    changed = bytearray(content)
    changed[4_000_000:4_030_000] = bytes(30_000)  # retraining changes all blocks; one of them is enough
    one.write_bytes(changed)
    assert files_digest([one]) != first
    other.write_bytes(content)
    assert files_digest([other]) != first
    assert files_digest([]) != first
