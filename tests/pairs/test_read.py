"""Preference pairs: every source's rows, the A/B order, and what happens to bad rows."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.pairs.pair import Message, PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import BadRow, ReadReport
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.prompt import get_prompt
from rmr1_jax.prompts.recover import recover_prompt

FLAG = "Is_Chosen_Answer_Shuffled_toPositionB"
ROW = {"id": "x", "question": "q", "response_a": "a", "response_b": "b"}
RM_BENCH = {
    "id": "chat/8",
    "prompt": "q",
    "chosen": ["c0", "c1", "c2"],
    "rejected": ["r0", "r1", "r2"],
    "domain": "chat",
}
PAIRWISE = {
    "pair_uid": "7",
    "conversation_input": [{"role": "user", "content": "hi", "language": "English"}],
    "chosen": {"llm_name": "m1", "answer": "good"},
    "reject": {"llm_name": "m2", "answer": "bad"},
    "category_path": "Pairwise_set/Helpfulness/Chat",
}


def write_jsonl(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the pair ----


def test_single_turn_pair():
    pair = PreferencePair.from_answers("1", "q", "a", "b", better="A", meta={"k": 1})
    assert pair.single_turn and (pair.question, pair.response_a, pair.response_b) == ("q", "a", "b")
    assert pair.conversation_a == (Message("user", "q"), Message("assistant", "a"))
    assert pair.swapped() == PreferencePair.from_answers("1", "q", "b", "a", better="B", meta={"k": 1})
    assert pair.swapped().swapped() == pair and hash(pair) == hash(pickle.loads(pickle.dumps(pair)))
    assert PreferencePair.from_answers("1", "q", "a", "b").swapped().better is None


def test_render_pair_takes_the_frame_that_fits():
    prompt = get_prompt("cor")
    single = PreferencePair.from_answers("1", "q", "a", "b")
    assert render_pair(prompt, single) == prompt.render("q", "a", "b")
    long = [("user", "q"), ("assistant", "a"), ("user", "r")]
    several = PreferencePair(
        id="2", conversation_a=(*long, ("assistant", "x")), conversation_b=(*long, ("assistant", "y"))
    )
    assert not several.single_turn and (several.question, several.response_b) == ("r", "y")
    assert render_pair(prompt, several) == prompt.render_conversations(several.conversation_a, several.conversation_b)
    # Two questions cannot be shown as one.
    other = PreferencePair(
        id="3", conversation_a=single.conversation_a, conversation_b=(("user", "p"), ("assistant", "b"))
    )
    assert not other.single_turn and "Chatbot B: b" in render_pair(prompt, other)[-1]["content"]


def test_empty_answers():
    assert "both_empty" not in PreferencePair.from_answers("1", "q", "a", "", better="A").meta
    pair = PreferencePair.from_answers("1", "q", " \n", "", better="A", meta={"k": 1})
    assert pair.meta == {"k": 1, "both_empty": True} and pair.swapped().meta == pair.meta


@pytest.mark.parametrize(
    ("conversation", "better", "message"),
    [
        ((), "A", "has the roles"),
        ((("user", "q"),), "A", "last one 'assistant'"),
        ((("system", "s"), ("assistant", "a")), "A", "has the roles"),
        ((("assistant", "a"),), "model_a", "better is 'model_a'"),
    ],
)
def test_bad_pair(conversation, better, message):
    with pytest.raises(InputError, match=message):
        PreferencePair(id="1", conversation_a=conversation, conversation_b=conversation, better=better)


# ---- our own rows ----


def test_own_rows(tmp_path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    rows = [
        {**ROW, "better": "B", "source": "s"},
        {"id": 2, "question": "q", "chosen": "good", "rejected": "bad"},
        {"id": "3", "conversation_a": turns, "conversation_b": turns * 2, "better": None},
        {"id": "4", "chosen": turns, "rejected": turns * 2},
        {"id": "5", "question": "q", "response_a": "", "response_b": ""},
    ]
    first, second, third, fourth, fifth = read_pairs(write_jsonl(tmp_path / "p.jsonl", rows))
    assert first == PreferencePair.from_answers("x", "q", "a", "b", better="B", meta={"source": "s"})
    assert second.id == "2" and {"A": second.response_a, "B": second.response_b}[second.better] == "good"
    assert third.better is None and len(third.conversation_b) == 4
    assert len({"A": fourth.conversation_b, "B": fourth.conversation_a}[fourth.better]) == 4
    assert fifth.meta == {"both_empty": True}


def test_chosen_rejected_order_is_drawn_by_seed_and_id_alone(tmp_path):
    rows = [{"id": f"r{k}", "question": "q", "chosen": "c", "rejected": "r"} for k in range(400)]
    forward = {pair.id: pair.better for pair in read_pairs(write_jsonl(tmp_path / "a.jsonl", rows))}
    backward = {pair.id: pair.better for pair in read_pairs(write_jsonl(tmp_path / "b.jsonl", rows[::-1]))}
    other = {pair.id: pair.better for pair in read_pairs(tmp_path / "a.jsonl", seed=1)}
    assert forward == backward != other
    assert 160 < sum(better == "B" for better in forward.values()) < 240
    assert 120 < sum(forward[key] != other[key] for key in forward) < 280


def test_containers_hold_the_same_rows(tmp_path):
    rows = [{**ROW, "id": str(k), "question": "é\u2028\n" * k} for k in range(5)]
    expected = list(read_pairs(write_jsonl(tmp_path / "rows.jsonl", rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "bom.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n")
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "bom.jsonl", "rows.parquet"):
        assert list(read_pairs(tmp_path / name)) == expected
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", rows[3:])
    (folder / "a.json").write_text(json.dumps(rows[:3]))
    (folder / "README.md").write_text("not data")
    assert [pair.id for pair in read_pairs(folder)] == ["0", "1", "2", "3", "4"]


# ---- the benchmarks ----


def test_legacy_flags_are_the_published_ones(shared_data):
    outcomes = load(shared_data / "rewardbench/outcomes_RM-R1-DeepSeek-Distilled-Qwen-32B.json")
    at = outcomes["columns"].index(FLAG)
    flags = LegacyFlags()
    assert [flags[k] for k in range(len(outcomes["rows"]))] == [row[at] for row in outcomes["rows"]]
    random = np.random.RandomState(7)
    drawn = [random.rand() > 0.5 for _ in range(9000)]
    other = LegacyFlags(7)
    assert [other[k] for k in reversed(range(9000))] == drawn[::-1]
    with pytest.raises(InputError, match="seed=-1"):
        LegacyFlags(-1)


def test_rewardbench(shared_data):
    path = shared_data / "rewardbench/filtered_sample.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    report = ReadReport()
    pairs = list(read_pairs(path, report=report))
    assert len(pairs) == 114 and str(report) == "114 rows read, 114 kept, 0 rejected"
    flags = LegacyFlags()
    for k, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        assert pair.better == ("B" if flags[k] else "A") and pair.single_turn and pair.question == row["prompt"]
        answers = {"A": (pair.response_a, pair.response_b), "B": (pair.response_b, pair.response_a)}[pair.better]
        assert answers == (row["chosen"], row["rejected"])
        assert pair.id == f"{row['subset']}/{row['id']}" and pair.meta["id"] == row["id"]
    assert [pair.better for pair in read_pairs(path, seed=1)] != [pair.better for pair in pairs]


def test_rewardbench_in_the_recorded_order_renders_to_the_published_rows(shared_data):
    recorded = {record["id"]: record[FLAG] for record in load(shared_data / "rewardbench/logs_sample.json")}
    path = shared_data / "rewardbench/filtered_sample.jsonl"
    ids = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = list(read_pairs(path, flags=[recorded[number] for number in ids]))
    published = list(read_published(shared_data / "published_rows/rlvr.jsonl"))
    prompt = recover_prompt(row.messages for row in published)
    assert [(render_pair(prompt, pair), pair.better) for pair in pairs] == [
        (row.messages, row.better) for row in published
    ]


def test_flags_that_are_too_few(shared_data):
    with pytest.raises(InputError, match="end before draw 3"):
        list(read_pairs(shared_data / "rewardbench/filtered_sample.jsonl", flags=[True] * 3))


def test_rm_bench(shared_data):
    items = load(shared_data / "rm_bench/dataset_sample.json")
    pairs = list(read_pairs(shared_data / "rm_bench/dataset_sample.json"))
    assert len(pairs) == 9 * len(items) == len({pair.id for pair in pairs})
    flags = LegacyFlags()
    by_id = {pair.id: pair for pair in pairs}
    for k, item in enumerate(items):
        for i in range(3):
            for j in range(3):
                pair = by_id[f"{item['id']}#{i}-{j}"]
                assert pair.better == ("B" if flags[k + len(items) * i] else "A")
                better, worse = (pair.response_a, pair.response_b)[:: 1 if pair.better == "A" else -1]
                assert (better, worse, pair.question) == (item["chosen"][i], item["rejected"][j], item["prompt"])
                assert (pair.meta["chosen_style"], pair.meta["rejected_style"]) == (i, j)
                assert pair.meta["domain"] == item["domain"] and pair.meta["item"] == item["id"]


def test_rm_bench_files_are_the_published_ones(shared_data, tmp_path):
    logs = [load(path) for path in sorted((shared_data / "rm_bench/logs").glob("*.json"))]
    keys = ("id", "prompt", "chosen", "rejected", "domain")
    items = [{key: item[key] for key in keys} for item in logs[0]]
    flags = [item[FLAG][style] for style in range(3) for item in logs[0]]
    pairs = list(read_pairs(write_jsonl(tmp_path / "d.jsonl", items), flags=flags))
    seen = {(pair.meta["file"], pair.meta["item"], pair.meta["chosen_style"]): pair for pair in pairs}
    assert len(seen) == 3 * 3 * 15
    for number, log in enumerate(logs, 1):
        for item in log:
            for style in range(3):
                pair = seen[number, item["id"], style]
                answers = (item["chosen"][style], item["rejected"][style])
                assert (pair.response_a, pair.response_b) == (answers[::-1] if item[FLAG][style] else answers)


def test_rmb_pairwise(shared_data):
    folder = shared_data / "rmb/Pairwise_set"
    items = [item for path in sorted(folder.rglob("*.json")) for item in load(path)]
    pairs = list(read_pairs(folder))
    flags = LegacyFlags()
    prompt = get_prompt("cor")
    assert len(items) == len(pairs) == 135
    for k, (item, pair) in enumerate(zip(items, pairs, strict=True)):
        assert pair.better == ("B" if flags[k] else "A") and pair.meta["category"] == item["category_path"]
        better, worse = (pair.conversation_a, pair.conversation_b)[:: 1 if pair.better == "A" else -1]
        assert better[-1].content == item["chosen"]["answer"] and worse[-1].content == item["reject"]["answer"]
        asked = [(message["role"], message["content"]) for message in item["conversation_input"]]
        assert list(better[:-1]) == list(worse[:-1]) == asked
        assert pair.single_turn == (len(asked) == 1)
        user = render_pair(prompt, pair)[-1]["content"]
        assert user.startswith(
            "[Client Question]" if pair.single_turn else "[The Start of the Conversation between Chatbot A"
        )


def test_rmb_best_of_n(shared_data):
    folder = shared_data / "rmb/BoN_set"
    items = [item for path in sorted(folder.rglob("*.json")) for item in load(path)]
    pairs = list(read_pairs(folder))
    expected = [(item, loser) for item in items for loser in item["loser_list"]]
    flags = LegacyFlags()
    assert len(pairs) == len(expected) == len({pair.id for pair in pairs}) == 78
    for k, ((item, loser), pair) in enumerate(zip(expected, pairs, strict=True)):
        assert pair.better == ("B" if flags[k] else "A")
        best, worse = (pair.response_a, pair.response_b)[:: 1 if pair.better == "A" else -1]
        assert (best, worse) == (item["bon_best"]["answer"], loser["answer"])
        assert pair.meta["item"] == f"{item['category_path']}#{item['bon_uid']}"
    assert len({pair.meta["item"] for pair in pairs}) == len(items) == 31


def test_a_rejected_row_does_not_move_the_order_of_the_others(tmp_path):
    good = [{**PAIRWISE, "pair_uid": str(k)} for k in range(40)]
    bad = [*good[:5], {**good[5], "chosen": None}, *good[6:]]
    whole = {pair.id: pair.better for pair in read_pairs(write_jsonl(tmp_path / "a.jsonl", good))}
    path = write_jsonl(tmp_path / "b.jsonl", bad)
    part = {pair.id: pair.better for pair in read_pairs(path, rejects=tmp_path / "r")}
    assert len(part) == 39 and part.items() < whole.items()


# ---- the published rows ----


@pytest.mark.parametrize(
    ("name", "count", "sides"), [("rlvr", 114, "AB"), ("reasoning_rlvr", 40, "AB"), ("distill_sft", 65, "")]
)
def test_published_rows_jsonl_and_parquet(shared_data, tmp_path, name, count, sides):
    path = shared_data / f"published_rows/{name}.jsonl"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = list(read_published(path))
    assert [(row.messages, row.winner) for row in rows] == [(row["context_messages"], row["winner"]) for row in raw]
    assert len(rows) == count and {row.better for row in rows} == (set(sides) or {None})
    assert all((row.trace is None) == bool(sides) for row in rows)
    if not sides:
        assert all(row.trace.startswith("<type>") for row in rows)
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / f"{name}.parquet", row_group_size=16)
    assert list(read_published(tmp_path / f"{name}.parquet")) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"winner": "model_a"}, "field 'context_messages' is missing"),
        ({"context_messages": "hi", "winner": "model_a"}, 'is "hi" .str., expected a list'),
        ({"context_messages": [], "winner": "model_a"}, "must end with a message whose role is 'user'"),
        ({"context_messages": [{"role": "user"}], "winner": "model_a"}, r"'context_messages\[0\].content' is missing"),
        (
            {"context_messages": [{"role": "tool", "content": "x"}], "winner": "model_a"},
            r"'context_messages\[0\].role' is \"tool\"",
        ),
        ({"context_messages": [{"role": "user", "content": "x"}], "winner": 1}, "'winner' is 1 .int., expected a text"),
        (
            {"context_messages": [{"role": "user", "content": "x"}], "winner": "model_c"},
            "expected 'model_a', 'model_b' or a trace",
        ),
        ({"context_messages": [{"role": "user", "content": "x"}], "winner": " "}, "'winner' is empty"),
    ],
)
def test_bad_published_row(tmp_path, row, message):
    with pytest.raises(BadRow, match=message):
        list(read_published(write_jsonl(tmp_path / "p.jsonl", [row])))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    if row.get("context_messages") != []:  # Parquet cannot tell what an empty list is a list of
        with pytest.raises(BadRow, match=r"p\.parquet, row 0: field"):
            list(read_published(tmp_path / "p.parquet"))
        rejects = tmp_path / "r.jsonl"
        assert not list(read_published(tmp_path / "p.parquet", rejects=rejects))
        assert json.loads(json.loads(rejects.read_text())["raw"]).keys() == row.keys()


# ---- bad rows ----

BAD_LINES = [
    (b'{"id": "1", "question": "q", "response_a": "a"}', None, "'response_b' is missing"),
    (
        b'{"id": "1", "question": "q", "response_a": 3, "response_b": "b"}',
        "response_a",
        "is 3 (int), expected a text",
    ),
    (
        b'{"id": "1", "question": null, "response_a": "a", "response_b": "b"}',
        "question",
        "is null, expected a text",
    ),
    (
        b'{"id": true, "question": "q", "response_a": "a", "response_b": "b"}',
        "id",
        "is true (bool), expected a text",
    ),
    (b'{"id": "", "question": "q", "response_a": "a", "response_b": "b"}', "id", "is empty"),
    (b'{"id": "1", "response_a": "a", "response_b": "b"}', "question", "is missing"),
    (b'{"id": "1", "question": "q"}', None, "got none of them"),
    (
        b'{"id": "1", "question": "q", "response_a": "a", "response_b": "b", "chosen": "c"}',
        None,
        "response_a/response_b and chosen",
    ),
    (
        b'{"id": "1", "question": "q", "response_a": "a", "response_b": "b", "better": "a"}',
        "better",
        "is 'a', expected 'A', 'B'",
    ),
    (
        b'{"id": "1", "question": "q", "response_a": "\\ud83d", "response_b": "b"}',
        "response_a",
        "half a surrogate pair",
    ),
    (b'{"id": "1", "conversation_a": [], "conversation_b": []}', "conversation_a", "must end with"),
    (
        b'{"id": "1", "conversation_a": [{"role": "user"}], "conversation_b": []}',
        "conversation_a[0].content",
        "is missing",
    ),
    (b'{"id": "1", "question": "q", ', None, "not JSON"),
    (b"[1, 2]", None, "is a list of 2, expected a JSON object"),
    (b"<!-- -->", None, "not JSON"),
    ('{"id": "é'.encode() + b'\xff"}', None, "not UTF-8 at byte 10"),
    (b'{"id": ' + b"9" * 5000 + b"}", None, "Exceeds the limit (4300 digits)"),
    (b"[" * 100_000, None, "nested too deep"),
]


@pytest.mark.parametrize(("line", "field", "reason"), BAD_LINES)
def test_bad_line(tmp_path, line, field, reason):
    path = write_jsonl(tmp_path / "p.jsonl", [ROW, b"", line, {**ROW, "id": "y"}])
    with pytest.raises(BadRow) as caught:
        list(read_pairs(path))
    bad = caught.value
    if "'response_b' is missing" in reason:
        field, reason = "response_b", "is missing"
    assert (bad.place.line, bad.place.index, bad.field) == (3, 1, field) and reason in bad.reason
    assert str(bad).startswith(f"{path}:3: ")

    report, rejects = ReadReport(), tmp_path / "rejects.jsonl"
    kept = list(read_pairs(path, rejects=rejects, report=report))
    assert [pair.id for pair in kept] == ["x", "y"]
    assert (report.read, report.kept, report.rejected, report.made) == (3, 2, 1, 2)
    (reject,) = [json.loads(text) for text in rejects.read_text().splitlines()]
    assert (reject["line"], reject["field"], reject["row"]) == (3, field, 1)
    assert reject["reason"] == bad.reason and reject["file"] == str(path)
    assert reject["raw"].encode() == line or b"\xff" in line


def test_place_of_a_field_in_a_json_array(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(
        '[\n  {"id": "1", "question": "é", "response_a": "a",\n   "response_b": "b"},\n  {"id": "2",\n'
        ' "question": "q", "response_a": "a",\n   "response_b": 7}, 5]\n',
        encoding="utf-8",
    )
    report = ReadReport()
    pairs = read_pairs(path, rejects=tmp_path / "r.jsonl", report=report)
    assert [pair.id for pair in pairs] == ["1"] and (report.read, report.kept, report.rejected) == (3, 1, 2)
    first, second = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (first["line"], first["field"], first["row"]) == (None, "response_b", 1)
    assert (second["line"], second["field"], second["row"]) == (None, None, 2)
    with pytest.raises(BadRow, match=r"p\.json, row 1: field 'response_b' is 7 \(int\), expected a text"):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[ROW,\n]", r"p\.json: not JSON: .*line 2 column 1"),
        ("[ROW\n ROW]", r"p\.json: not JSON: Expecting ',' delimiter: line 2 column 2"),
        ("[ROW", r"p\.json: not JSON: Expecting ',' delimiter: line 1 column \d+"),
        ("[ROW] x", r"p\.json: not JSON: Extra data: line 1 column \d+"),
        ('[\n\n {"id": }]', r"p\.json: not JSON: .*line 3 column 9"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_an_invalid_array_is_an_error_with_and_without_rejects(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text.replace("ROW", json.dumps(ROW)))
    for how in ({}, {"rejects": tmp_path / "r.jsonl"}):
        with pytest.raises(InputError, match=message):
            list(read_pairs(tmp_path / "p.json", **how))


def test_array_that_is_not_utf8(tmp_path):
    (tmp_path / "p.json").write_bytes('[\n "é'.encode() + b'\xff"]')
    with pytest.raises(InputError, match=r"p\.json: not UTF-8 at byte 6"):
        list(read_pairs(tmp_path / "p.json"))


def test_a_second_row_with_an_id(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{**ROW, "id": 1}, {**ROW, "id": 2}, {**ROW, "id": "1"}])
    with pytest.raises(BadRow, match=r"p.jsonl:3: field 'id' is '1' a second time; line 1 has it too"):
        list(read_pairs(path))
    report = ReadReport()
    pairs = read_pairs(path, rejects=tmp_path / "r.jsonl", report=report)
    assert [pair.id for pair in pairs] == ["1", "2"] and report.rejected == 1
    # The one id that RewardBench has twice is in two subsets, and stays.
    twice = [
        {"prompt": "q", "chosen": "c", "rejected": "r", "subset": s, "id": 3692} for s in ("donotanswer", "hep-python")
    ]
    assert len(list(read_pairs(write_jsonl(tmp_path / "rb.jsonl", twice)))) == 2


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**RM_BENCH, "chosen": ["c0", "c1"]}, "chosen"),
        ({**RM_BENCH, "rejected": "r"}, "rejected"),
        ({**RM_BENCH, "rejected": ["r0", None, "r2"]}, "rejected[1]"),
        ({**PAIRWISE, "reject": "x"}, "reject"),
        ({**PAIRWISE, "chosen": {"llm_name": "m"}}, "chosen.answer"),
        ({**PAIRWISE, "conversation_input": [{"role": "bot", "content": "x"}]}, "conversation_input[0].role"),
        ({**PAIRWISE, "conversation_input": []}, "conversation_input"),
        ({key: value for key, value in PAIRWISE.items() if key != "pair_uid"}, "bon_uid"),
        (
            {
                "bon_uid": "1",
                "bon_best": {"answer": "x"},
                "loser_list": [],
                **{k: PAIRWISE[k] for k in ("conversation_input", "category_path")},
            },
            "loser_list",
        ),
        (
            {
                "bon_uid": "1",
                "bon_best": {"answer": "x"},
                "loser_list": [None],
                **{k: PAIRWISE[k] for k in ("conversation_input", "category_path")},
            },
            "loser_list[0]",
        ),
        ({"prompt": "q", "chosen": "c", "rejected": 1, "subset": "s", "id": 1}, "rejected"),
    ],
)
def test_bad_benchmark_row(tmp_path, row, field):
    with pytest.raises(BadRow) as caught:
        list(read_pairs(write_jsonl(tmp_path / "p.jsonl", [row])))
    assert caught.value.field == field


def test_a_source_that_holds_no_pairs_is_named(shared_data, tmp_path):
    with pytest.raises(InputError, match="read_published"):
        read_pairs(shared_data / "published_rows/rlvr.jsonl")
    with pytest.raises(InputError, match="a log of judgements"):
        read_pairs(shared_data / "rm_bench/logs/total_dataset_2_RM-R1-Qwen2.5-Instruct-32B.json")
    with pytest.raises(InputError, match="nearest is 'rewardbench'"):
        read_pairs(tmp_path, format="reward-bench")
    with pytest.raises(InputError, match="No such file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"holds no \.jsonl, \.json, \.parquet, .*\.csv\.gz file"):
        read_pairs(tmp_path)
    (tmp_path / "p.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        read_pairs(tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_pairs(tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_bytes(b"<!DOCTYPE html>\n<html>")
    with pytest.raises(InputError, match="HTML page"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_rejects_file_must_lie_outside_the_source(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [ROW])
    for rejects in (path, tmp_path / "sub/r.jsonl"):
        with pytest.raises(InputError, match="lies in the source"):
            read_pairs(path if rejects == path else tmp_path, rejects=rejects)
    assert path.stat().st_size > 0
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_pairs(path, rejects=tmp_path / "none/r.jsonl"))


def test_only_bad_rows(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [b"x", b"y"])
    with pytest.raises(BadRow, match=r"p\.jsonl:1: not JSON"):
        list(read_pairs(path))
    report = ReadReport()
    assert not list(read_pairs(path, rejects=tmp_path / "r.jsonl", report=report))
    assert (report.read, report.kept, report.rejected) == (2, 0, 2)


def test_jsonl_is_read_as_it_is_consumed(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{**ROW, "id": k} for k in range(10)] + [b"broken"])
    report = ReadReport()
    pairs = read_pairs(path, report=report)
    assert [next(pairs).id for _ in range(3)] == ["0", "1", "2"] and report.read == 3
