"""Tests of logs: JSON arrays written element by element, conversion of entries and rows, and malformed ones."""

import json

import pytest
from policies import answer

from rmr1_jax.errors import InputError, RunError
from rmr1_jax.eval.logs import FLAG, ArrayFiles, conversations, extras, is_ours, log_files, read_judgements, shown_text
from rmr1_jax.eval.rewardbench import RewardBench
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.rows import BadRow

ENTRY = {
    "text_chosen": [{"content": "q", "role": "user"}, {"content": "good", "role": "assistant"}],
    "text_rejected": [{"content": "q", "role": "user"}, {"content": "bad", "role": "assistant"}],
    "results": 1,
    "answers": answer("B"),
    FLAG: True,
    "subset": "hep-cpp",
    "id": 1,
}
JUDGED = {
    "id": "hep-cpp/1",
    "better": "B",
    "winner": "B",
    "status": "ok",
    "correct": True,
    "votes": {"A": 0, "B": 1, "invalid": 0},
    "question": "q",
    "response_a": "bad",
    "response_b": "good",
    "meta": {"benchmark": "rewardbench", "subset": "hep-cpp", "id": 1, "section": "Reasoning"},
    "kind": None,
    "texts": [[answer("B")]],
    "verdicts": [["B"]],
    "tokens": [],
}


def log(tmp_path, *entries):
    path = tmp_path / "logs.json"
    path.write_text(json.dumps(entries))
    return path


def test_arrays_are_laid_out_as_published(tmp_path):
    rows = [{"a": "x\n[1,\n 2]", "b": [1, {"c": "é\u2028"}], "d": []}, {"a": ""}, {}]
    with ArrayFiles(tmp_path) as files:
        for row in rows:
            files.add("deep/down/logs.json", row)
            files.add("half.json", {"text": "\ud83d"})
        assert not (tmp_path / "deep/down/logs.json").exists()
    text = (tmp_path / "deep/down/logs.json").read_text(encoding="utf-8")
    assert text == json.dumps(rows, indent=1, ensure_ascii=False)
    assert json.loads((tmp_path / "half.json").read_bytes()) == [{"text": "\ud83d"}] * 3
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["half.json", "logs.json"]


def test_an_interrupted_array_leaves_the_older_one(tmp_path):
    (tmp_path / "logs.json").write_text("before")
    with pytest.raises(KeyboardInterrupt), ArrayFiles(tmp_path) as files:
        files.add("logs.json", {"a": 1})
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["logs.json"]
    assert (tmp_path / "logs.json").read_text() == "before"
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"cannot be written: .*; run the same command again"),
        ArrayFiles(tmp_path) as files,
    ):
        files.add("file/logs.json", {})


def test_an_entry_becomes_our_row(tmp_path):
    (row,) = RewardBench().judgements_of(read_rows(log(tmp_path, ENTRY)))
    assert row == JUDGED
    assert conversations(row) == ([("user", "q"), ("assistant", "good")], [("user", "q"), ("assistant", "bad")])
    wrong, silent, odd, tie = RewardBench().judgements_of(
        read_rows(
            log(
                tmp_path,
                {**ENTRY, "results": 0, "answers": answer("A")},
                {**ENTRY, "results": 0, "answers": "[[A]] or [[B]]"},
                {**ENTRY, "results": 1, "answers": answer("A"), "id": 2},
                {**ENTRY, "results": 0.5, "answers": ""},
            )
        )
    )
    assert (wrong["winner"], wrong["status"], wrong["correct"]) == ("A", "ok", False)
    assert (silent["winner"], silent["status"], silent["votes"]) == (None, "invalid", {"A": 0, "B": 0, "invalid": 1})
    assert odd["correct"] and odd["note"] == "the log says 1, its text says A"  # the log's word counts
    assert (tie["winner"], tie["correct"]) == (None, False)


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"results": True}, "results", "is true (bool), expected 1 or 0"),
        ({"results": "1"}, "results", 'is "1" (str), expected 1 or 0'),
        ({FLAG: 1}, FLAG, "is 1 (int), expected true or false"),
        ({"answers": None}, "answers", "is null, expected a text"),
        ({"text_chosen": []}, "text_chosen", "must end with a message whose role is 'assistant'"),
        ({"id": None}, "id", "is null, expected a text"),
    ],
)
def test_a_bad_entry_is_named_with_its_place(tmp_path, change, field, reason):
    with pytest.raises(BadRow) as caught:
        list(RewardBench().judgements_of(read_rows(log(tmp_path, ENTRY, {**ENTRY, **change}))))
    place = caught.value.place
    assert (caught.value.field, place.line, place.index) == (field, None, 1) and reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"better": None}, "field 'better' is null, expected 'A' or 'B'"),
        ({"correct": 1}, "field 'correct' is 1 (int), expected a valid boolean"),
        ({"meta": {}}, "field 'meta.benchmark' is missing"),
    ],
)
def test_a_bad_row_of_ours_is_named(tmp_path, change, reason):
    path = tmp_path / "judgements.jsonl"
    path.write_text(json.dumps(JUDGED) + "\n" + json.dumps({**JUDGED, **change}) + "\n")
    with pytest.raises(BadRow) as caught:
        list(read_judgements(path))
    assert str(caught.value).startswith(f"{path}:2:") and reason in str(caught.value)


def test_the_shown_text_is_of_the_first_order_and_names_the_winner():
    texts = [["none", answer("A"), answer("B")], [answer("B")] * 3]
    row = {**JUDGED, "texts": texts, "verdicts": [[None, "A", "B"], ["A", "A", "A"]]}
    assert [shown_text({**row, "winner": winner}) for winner in ("A", "B", None)] == [answer("A"), answer("B"), "none"]
    assert shown_text({**row, "verdicts": [["B"] * 3, ["A"] * 3], "winner": "A"}) == "none"
    assert shown_text({**row, "texts": [], "verdicts": []}) == ""
    assert extras(row)["texts"] == texts and "texts" not in extras(JUDGED)
    assert extras({**row, "texts": [], "verdicts": []})["texts"] == []  # nothing was asked, which "" would not tell
    assert extras(JUDGED) == {key: JUDGED[key] for key in ("winner", "status", "votes", "kind", "verdicts", "tokens")}


def test_log_files_of_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"holds no judgements\.jsonl and no logs\.json"):
        log_files(tmp_path, ["logs.json"])
    for name in ("b/logs.json", "a/logs.json", "a/score.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    found = log_files(tmp_path, ["logs.json"])
    assert found == [tmp_path / "a/logs.json", tmp_path / "b/logs.json"]
    (tmp_path / "judgements.jsonl").write_text("")
    (own,) = log_files(tmp_path, ["*.json"])
    assert own == tmp_path / "judgements.jsonl" and is_ours(own) and not is_ours(found[0])
    assert log_files(found[0], []) == [found[0]]
