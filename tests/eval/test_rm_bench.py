"""Tests of RM-Bench: scores by hand, with the released scorer's mistake and without; three files; missing pairs."""

import itertools
import json

import pytest
from eval_worker import ScriptedJudge

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import FLAG, OURS, ArrayFiles, log_files
from rmr1_jax.eval.rm_bench import LOG, RmBench
from rmr1_jax.judge.judgement import Voting
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.prompts.verdict import eval_verdict

BENCHMARK = RmBench()
SCORES = BENCHMARK.main_scores
KEYS = ["chat", "math", "code", "safety", "hard_acc", "normal_acc", "easy_acc", "total_avg_acc"]
MODEL = "RM-R1-Qwen2.5-Instruct-32B"


def records(domains):
    """{domain: [3x3 matrix an item]} -> records."""
    return [
        {"domain": domain, "item": f"{domain}/{k}", "chosen_style": i, "rejected_style": j, "correct": bool(m[i][j])}
        for domain, items in domains.items()
        for k, m in enumerate(items)
        for i, j in itertools.product(range(3), repeat=2)
    ]


def score(records, released=False):
    """The score files of records, whose fields but `correct` are a row's meta."""
    rows = ({"id": str(k), "correct": record["correct"], "meta": record} for k, record in enumerate(records))
    return RmBench(released=released).scores(rows)


# [chosen style][rejected style]. File 1 holds the diagonal, file 2 the cells 01, 12, 20, file 3 the cells 02, 10, 21.
CHAT = [[[1, 0, 1], [1, 1, 0], [1, 1, 0]], [[1, 0, 0], [0, 0, 0], [1, 0, 1]]]
SAFETY = [[[1, 1, 1], [1, 1, 1], [0, 1, 1]]]


def test_both_scorers_by_hand():
    made = records({"chat": CHAT, "safety-refuse": SAFETY})
    # chat, upper triangle (01, 02, 12): 0 + 1 + 0 and 0 + 0 + 0 of 6; diagonal 2 + 2; lower (10, 20, 21): 3 and 1.
    # safety: 3 of 3, 3 of 3, 2 of 3.
    right = score(made)[SCORES]
    assert right == pytest.approx(
        {
            "chat": (1 / 6 + 4 / 6 + 4 / 6) / 3,
            "safety": (1 + 1 + 2 / 3) / 3,
            "hard_acc": (1 / 6 + 1) / 2,
            "normal_acc": (4 / 6 + 1) / 2,
            "easy_acc": (4 / 6 + 2 / 3) / 2,
            "total_avg_acc": ((1 / 6 + 4 / 6 + 4 / 6) / 3 + (1 + 1 + 2 / 3) / 3) / 2,
        },
        abs=1e-15,
    )
    # With the slip the cells of file 2 are those of file 3: 01 <- 02, 12 <- 10, 20 <- 21.
    # chat: upper 02 + 02 + 10 = 1 + 1 + 1 and 0; lower 10 + 21 + 21 = 1 + 1 + 1 and 0. safety: 3 and 3.
    slipped = score(made, released=True)[SCORES]
    assert slipped == pytest.approx(
        {
            "chat": (3 / 6 + 4 / 6 + 3 / 6) / 3,
            "safety": 1,
            "hard_acc": (3 / 6 + 1) / 2,
            "normal_acc": (4 / 6 + 1) / 2,
            "easy_acc": (3 / 6 + 1) / 2,
            "total_avg_acc": ((3 / 6 + 4 / 6 + 3 / 6) / 3 + 1) / 2,
        },
        abs=1e-15,
    )


def test_scores_equal_those_of_the_released_script():
    """The nine cells are spelled out as in the released script, which reads file 3 in place of file 2."""
    sizes = {"chat": 5, "math": 7, "code": 3, "safety-refuse": 4, "safety-response": 2}
    flags = LegacyFlags(3)
    draw = itertools.count()
    made = {name: [[[flags[next(draw)] for _ in "012"] for _ in "012"] for _ in range(n)] for name, n in sizes.items()}
    domains = {
        "safety": made["safety-refuse"] + made["safety-response"],
        **{n: made[n] for n in ("chat", "math", "code")},
    }
    for released, second in ((False, [(0, 1), (1, 2), (2, 0)]), (True, [(0, 2), (1, 0), (2, 1)])):
        parts = {}
        for name, items in domains.items():
            cells = {}
            for i in range(3):
                cells[i, i] = [m[i][i] for m in items]
                cells[i, (i + 1) % 3] = [m[second[i][0]][second[i][1]] for m in items]
                cells[i, (i + 2) % 3] = [m[i][(i + 2) % 3] for m in items]
            mean = {cell: sum(own) / len(own) for cell, own in cells.items()}
            hard, normal = mean[0, 1] + mean[0, 2] + mean[1, 2], mean[0, 0] + mean[1, 1] + mean[2, 2]
            parts[name] = (hard / 3, normal / 3, (mean[1, 0] + mean[2, 0] + mean[2, 1]) / 3)
        found = score(records(made), released=released)[SCORES]
        assert list(found) == KEYS
        for name, own in parts.items():
            assert found[name] == pytest.approx(sum(own) / 3, abs=1e-14)
        for k, name in enumerate(("hard_acc", "normal_acc", "easy_acc")):
            assert found[name] == pytest.approx(sum(own[k] for own in parts.values()) / 4, abs=1e-14)
        assert found["total_avg_acc"] == pytest.approx(sum(map(sum, parts.values())) / 12, abs=1e-14)


def test_missing_judgements_are_named():
    made = [
        r for r in records({"code": CHAT}) if (r["chosen_style"], r["rejected_style"]) not in ((0, 1), (1, 2), (2, 0))
    ]
    with pytest.raises(InputError, match="item 'code/0' has no judgement of chosen style 0, rejected style 1: file 2"):
        score(made)
    assert score(made, released=True)[SCORES]["code"] == pytest.approx((3 / 6 + 4 / 6 + 3 / 6) / 3)
    with pytest.raises(InputError, match="no judgements to score"):
        score([])
    with pytest.raises(InputError, match="domain 'art' is none of RM-Bench's: chat, math, code, safety"):
        score(records({"art": CHAT}))


def test_every_result_of_the_published_logs_follows_from_its_text(shared_data):
    files = log_files(shared_data / "rm_bench/logs", BENCHMARK.log_names)
    assert [file.name for file in files] == [f"total_dataset_{k}_{MODEL}.json" for k in (1, 2, 3)]
    rows = {}
    for number, file in enumerate(files, 1):
        entries = json.loads(file.read_text(encoding="utf-8"))
        own = list(BENCHMARK.judgements_of(read_rows(file)))
        assert len(own) == 3 * len(entries) == 45
        expected = [(entry, i) for entry in entries for i in range(3)]
        for (entry, i), row in zip(expected, own, strict=True):
            in_b = entry[FLAG][i]
            assert entry["result"][i] == int(eval_verdict(entry["output"][i]) == ("B" if in_b else "A"))
            assert row["correct"] == (entry["result"][i] == 1) and "note" not in row
            assert (row["meta"]["chosen_style"], row["meta"]["rejected_style"]) == (i, (i + number - 1) % 3)
            assert row["response_b" if in_b else "response_a"] == entry["chosen"][i]
            assert row["response_a" if in_b else "response_b"] == entry["rejected"][i]
        rows |= {row["id"]: row for row in own}
    assert len(rows) == 9 * 15
    # Each rejected answer stands in all three files, in its place.
    for row in rows.values():
        other = rows[
            row["id"].split("#")[0] + f"#{(row['meta']['chosen_style'] + 1) % 3}-{row['meta']['rejected_style']}"
        ]
        loser = {"A": "response_b", "B": "response_a"}
        assert row[loser[row["better"]]] == other[loser[other["better"]]]


def test_the_nine_pairs_of_the_published_items_are_ours(shared_data, tmp_path):
    """An item of the logs, loaded as data, gives the same nine pairs, and their log is the published entry."""
    files = log_files(shared_data / "rm_bench/logs", BENCHMARK.log_names)
    published = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    items = [{key: entry[key] for key in ("id", "prompt", "chosen", "rejected", "domain")} for entry in published[0]]
    (tmp_path / "data.json").write_text(json.dumps(items))
    pairs = list(BENCHMARK.load(tmp_path / "data.json"))
    judged = dict(ScriptedJudge().stream(pairs, Voting()))
    rows = [json.loads(json.dumps(judgement_row(pair, judged[k]))) for k, pair in enumerate(pairs)]
    with ArrayFiles(tmp_path) as written:
        BENCHMARK.write_logs(written, rows, MODEL)
    for file, theirs in zip((1, 2, 3), published, strict=True):
        path = tmp_path / LOG.format(file=file, model=MODEL)
        ours = json.loads(path.read_text(encoding="utf-8"))
        assert list(ours[0]) == [*theirs[0], OURS]
        for key in ("id", "prompt", "chosen", "rejected", "domain"):
            assert [entry[key] for entry in ours] == [entry[key] for entry in theirs]
        again = {row["id"]: row for row in BENCHMARK.judgements_of(read_rows(path))}
        for row in rows:
            if row["meta"]["file"] == file:
                meta = {key: value for key, value in row["meta"].items() if key not in ("index", "number")}
                assert again.pop(row["id"]) == {**row, "meta": meta}
        assert not again


def test_an_item_without_all_its_pairs_is_left_out_of_the_logs(shared_data, tmp_path):
    pairs = list(BENCHMARK.load(shared_data / "rm_bench/dataset_sample.json"))[:27]
    judged = dict(ScriptedJudge().stream(pairs, Voting()))
    rows = [judgement_row(pair, judged[k]) for k, pair in enumerate(pairs)]
    with ArrayFiles(tmp_path) as files:
        BENCHMARK.write_logs(files, [*rows[:9], *rows[10:]], "m")
    for file in (1, 2, 3):
        entries = json.loads((tmp_path / LOG.format(file=file, model="m")).read_text(encoding="utf-8"))
        assert [entry["id"] for entry in entries] == [rows[0]["meta"]["item"], rows[18]["meta"]["item"]]


def test_a_log_by_another_name_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('[{"id": 1}]')
    with pytest.raises(InputError, match=r"mine\.json: expected total_dataset_1_\*\.json, _2_ or _3_"):
        list(BENCHMARK.judgements_of(read_rows(tmp_path / "mine.json")))
    with pytest.raises(InputError, match=r"holds no judgements\.jsonl and no total_dataset_\[123\]_"):
        log_files(tmp_path, BENCHMARK.log_names)
