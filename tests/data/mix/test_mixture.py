"""Mixtures: filters, draws, duplicates, overlap, balance, order, and counts that add up."""

import dataclasses
import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import yaml
from mixtures import SOURCES, code, counts, error_of, made, math_step, own, said, simple, skywork, write

from rmr1_jax.cli import main as cli
from rmr1_jax.data.mix import mixture
from rmr1_jax.data.mix.sources import DROPPED
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.pairs.rows import BadRow


@pytest.fixture
def paper(tmp_path):
    """A small version of the paper's mixture, as the tree of a config."""
    return {
        "out": str(tmp_path / "out"),
        "sources": [
            {"path": write(tmp_path / "sky.jsonl", map(skywork, range(200))), "exclude": {"source": ["magpie_ultra"]}},
            {"path": write(tmp_path / "code.jsonl", map(code, range(100))), "count": 30, "shuffle": 42},
            {"path": write(tmp_path / "math.jsonl", map(math_step, range(41)))},
        ],
    }


# ---- the paper's mixture ----


def test_the_paper_s_mixture_in_small(paper, tmp_path):
    report, pairs, written = made(paper, tmp_path)
    assert [(s.name, s.format, s.read, s.kept, s.filtered, s.not_drawn) for s in report.sources] == [
        ("sky", "skywork", 200, 150, 50, 0),
        ("code", "code-preference", 100, 30, 0, 70),
        ("math", "math-step", 41, 41, 0, 0),
    ]
    assert report.pairs == len(pairs) == 221 and len({pair.id for pair in pairs}) == 221
    assert [pair.better for pair in pairs] == ["A", "B"] * 110 + ["A"]
    assert report.a == sum(source.a for source in report.sources) == 111
    by_id = {pair.id: pair for pair in pairs}
    drawn = np.random.default_rng(42).permutation(100)[:30]  # datasets.Dataset.shuffle(seed=42).select(range(30))
    assert {pair.id for pair in pairs if pair.id.startswith("code/")} == {f"code/{k}" for k in drawn}
    for k in range(200):
        pair = by_id.pop(f"sky/{k}", None)
        assert (pair is None) == (k % 4 == 2)
        if pair is not None:
            assert pair.meta == {"source": "sky", "origin": SOURCES[k % 4]} and pair.single_turn == bool(k % 5)
            shown = (pair.conversation_a, pair.conversation_b) if pair.better == "A" else (None, None)
            assert shown in (
                (None, None),
                tuple(tuple((m["role"], m["content"]) for m in skywork(k)[s]) for s in ("chosen", "rejected")),
            )
    for id, pair in by_id.items():
        source, k = id.split("/")
        right, wrong = (code(int(k))[x] for x in ("accepted", "rejected"))
        if source == "math":
            right, wrong = f"step\nso {k}", f"step\nso {int(k) + 1}"
        answers = (pair.response_a, pair.response_b)
        assert answers == ((right, wrong) if pair.better == "A" else (wrong, right)) and pair.meta["source"] == source
    assert {pair.meta["answer"] for pair in pairs if "answer" in pair.meta} == set(range(41))
    assert written["sources"] == [dataclasses.asdict(source) for source in report.sources]
    assert written["sha256"] == hashlib.sha256((tmp_path / "out/pairs.jsonl").read_bytes()).hexdigest()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mixture.json", "pairs.jsonl"]


def test_the_balance_is_exact_and_near_it_in_every_source(tmp_path):
    tree = simple(tmp_path, [own(k, "AB"[k % 7 == 0]) for k in range(2001)])
    report, pairs, _ = made(tree, tmp_path)
    assert (report.pairs, report.a) == (2001, 1001) and abs(report.a / report.pairs - 0.5) < 0.005
    for pair in pairs:
        k = int(pair.id.removeprefix("own/p"))
        best = pair.response_a if pair.better == "A" else pair.response_b
        assert best == (f"b{k}" if k % 7 == 0 else f"a{k}")


def test_the_same_config_gives_the_same_bytes_and_another_seed_another_order(paper, tmp_path):
    files = []
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        made(paper, tmp_path, f"out={tmp_path / out}", f"seed={seed}")
        files.append([(tmp_path / out / name).read_bytes() for name in ("pairs.jsonl", "mixture.json")])
    assert files[0] == files[1]
    lists = [[json.loads(line) for line in each[0].splitlines()] for each in files]

    def unordered(row):  # independent of which side is shown first
        sides = [[row.pop(f"{name}_{side}", None) for name in ("response", "conversation")] for side in "ab"]
        return (row["id"], json.dumps([row, sides if row.pop("better") == "A" else sides[::-1]]))

    assert [row["id"] for row in lists[0]] != [row["id"] for row in lists[2]]
    assert sorted(map(unordered, lists[0])) == sorted(map(unordered, lists[2]))
    made(paper, tmp_path, f"out={tmp_path / 'one'}")  # over itself
    assert (tmp_path / "one/pairs.jsonl").read_bytes() == files[0][0]


def test_an_added_row_leaves_the_order_of_the_others(tmp_path):
    rows = [own(k) for k in range(100)]
    _, before, _ = made(simple(tmp_path, rows), tmp_path)
    _, after, _ = made(simple(tmp_path, [*rows, own(100)]), tmp_path, f"out={tmp_path / 'more'}")
    assert [pair.id for pair in after if pair.id != "own/p100"] == [pair.id for pair in before]
    assert [pair.id for pair in before] != sorted(pair.id for pair in before)


def test_a_mixture_can_be_a_source_of_another(paper, tmp_path):
    made(paper, tmp_path)
    again = {"out": str(tmp_path / "again"), "sources": [{"path": str(tmp_path / "out/pairs.jsonl"), "name": "first"}]}
    report, pairs, _ = made(again, tmp_path)
    assert (report.sources[0].read, report.pairs) == (221, 221)
    assert {pair.meta["origin"] for pair in pairs} <= {"sky", "code", "math"}


def test_published_rows_are_no_source(shared_data, tmp_path):
    path = str(shared_data / "published_rows/rlvr.jsonl")
    tree = {"out": str(tmp_path / "out"), "sources": [{"path": path}]}
    assert "training and `rmr1 data prepare` take them unchanged" in error_of(made, tree, tmp_path)


# ---- the tests of a row ----


def test_filters(tmp_path):
    rows = [own(k, kind=["x", "y", "z", 1, None][k % 5], hard=bool(k % 2)) for k in range(50)]
    tree = simple(tmp_path, rows, where={"kind": ["x", 1, None]}, exclude={"hard": [True]})
    report, pairs, _ = made(tree, tmp_path)
    wanted = [k for k in range(50) if k % 5 in (0, 3, 4) and k % 2 == 0]
    assert sorted(int(pair.id.removeprefix("own/p")) for pair in pairs) == wanted
    assert counts(report) == {"read": 50, "kept": len(wanted), "filtered": 50 - len(wanted)}
    assert report.sources[0].notes == []


def test_a_filter_that_matches_nothing_is_reported(tmp_path):
    rows = [own(k, kind="x") for k in range(4)]
    message = error_of(made, simple(tmp_path, rows, exclude={"kimd": ["x"]}), tmp_path)
    assert "source own: no row has the field 'kimd' to filter by; they have better, id, kind" in message
    report, _, _ = made(simple(tmp_path, rows, exclude={"kind": ["magpie"]}), tmp_path)
    assert report.sources[0].notes == ["exclude: no row has 'magpie' in 'kind'"]
    assert report.table().splitlines()[-1] == "own: exclude: no row has 'magpie' in 'kind'"
    assert "of 4 rows no pair is left" in error_of(
        made, simple(tmp_path, rows, exclude={"kind": ["x"]}), tmp_path, f"out={tmp_path / 'o'}"
    )


def test_a_draw(tmp_path):
    rows = [own(k) for k in range(20)]
    report, pairs, _ = made(simple(tmp_path, rows, count=5), tmp_path)
    assert sorted(pair.id for pair in pairs) == [f"own/p{k}" for k in range(5)]
    assert counts(report) == {"read": 20, "kept": 5, "not_drawn": 15}
    report, pairs, _ = made(simple(tmp_path, rows, count=21, shuffle=1), tmp_path, f"out={tmp_path / 'o'}")
    assert len(pairs) == 20 and report.sources[0].notes == ["count=21, but there are only 20 rows to draw from"]


def test_answers_that_are_the_same_cannot_be_judged(tmp_path):
    rows = [
        own(0),
        own(1, response_a="", response_b=" \n"),
        own(2, response_a="x", response_b="x "),
        own(3, response_b=""),
    ]
    report, pairs, _ = made(simple(tmp_path, rows), tmp_path)
    assert sorted(pair.id for pair in pairs) == ["own/p0", "own/p3"]  # an empty answer is a valid loser
    assert counts(report) == {"read": 4, "kept": 2, "alike": 2, "both_empty": 1}


def test_ties_are_dropped_and_counted(tmp_path):
    trl = {"prompt": [{"role": "user", "content": "q"}], "chosen": "c", "rejected": "r"}
    rows = [own(0), own(1, "tie"), {**own(2), "better": None}, trl, {**trl, "prompt": "p", "better": "tie"}]
    with pytest.raises(BadRow, match=r"own\.jsonl:3: field 'better' names no better answer"):
        made(simple(tmp_path, rows), tmp_path)
    rows.pop(2)
    report, pairs, _ = made(simple(tmp_path, rows), tmp_path)
    assert counts(report) == {"read": 4, "kept": 2, "ties": 2}
    assert sorted(pair.id for pair in pairs) == ["own/2", "own/p0"] and "  ties  " in report.table()


def test_duplicates_and_contradictions(tmp_path):
    def reversed_pair(k, better):  # the same pair as own(k) in the other order
        return own(k, better, id=f"t{k}", response_a=f"b{k}", response_b=f"a{k}")

    rows = [
        *(own(k) for k in range(6)),
        reversed_pair(0, "B"),  # repeats that a0 is better
        own(1, id="r1"),
        own(1, id="s1", question="q1\n"),
        reversed_pair(2, "A"),  # contradicts own(2)
        own(3, "B", id="r3"),
        own(3, id="s3"),
        own(4, id="r4", question="another"),
        own(5, id="r5", response_b="another"),
    ]
    report, pairs, _ = made(simple(tmp_path, rows), tmp_path)
    assert sorted(pair.id for pair in pairs) == ["own/p0", "own/p1", "own/p4", "own/p5", "own/r4", "own/r5"]
    assert counts(report) == {"read": 14, "kept": 6, "duplicates": 3, "contradictory": 5}


def test_duplicates_across_sources_belong_to_the_later_one(tmp_path):
    talk = {"id": "t", "conversation_a": said("q1", "b1"), "conversation_b": said("q1", "a1"), "better": "B"}
    tree = {
        "out": str(tmp_path / "out"),
        "sources": [
            {"path": write(tmp_path / "x.jsonl", [own(1), own(2)])},
            {"path": write(tmp_path / "y.jsonl", [own(1), talk, own(3)])},
        ],
    }
    report, pairs, _ = made(tree, tmp_path)
    assert sorted(pair.id for pair in pairs) == ["x/p1", "x/p2", "y/p3"]
    assert [(source.kept, source.duplicates) for source in report.sources] == [(2, 0), (1, 2)]


def test_overlap_is_counted_by_benchmark_and_source(tmp_path):
    long = "please write a short poem about the sea and the old man who lives alone there"
    first = [
        {"prompt": long, "chosen": "x", "rejected": "y", "subset": "hep-rust", "id": 1},
        {"prompt": "What is Rust?", "chosen": "x", "rejected": "y", "subset": "hep-rust", "id": 2},
    ]
    second = [
        {"id": "c/1", "prompt": f"{long} by the pier", "chosen": ["x"] * 3, "rejected": ["y"] * 3, "domain": "chat"}
    ]
    benchmarks = [write(tmp_path / "rb.jsonl", first), write(tmp_path / "rm.jsonl", second)]
    rows = [own(0), own(1, question="what is RUST"), own(2, question=f"Hello. {long}!"), own(3, question=long), own(4)]
    tree = simple(tmp_path, rows) | {"overlap": {"benchmarks": benchmarks}}
    overlaps = {benchmarks[0]: {"exact": 2, "near": 1}, benchmarks[1]: {"exact": 0, "near": 2}}
    report, pairs, written = made(tree, tmp_path)
    assert len(pairs) == 5 and counts(report) == {"read": 5, "kept": 5}
    assert report.sources[0].overlaps == overlaps == written["sources"][0]["overlaps"]
    assert f"own: overlaps with {benchmarks[0]}: 2 exact, 1 near" in report.table()
    words = " ".join(long.split()[:13])
    assert {
        "source": "own",
        "id": "own/p2",
        "benchmark": benchmarks[0],
        "kind": "near",
        "benchmark_id": "hep-rust/1",
        "words": words,
    } in written["examples"]
    report, pairs, _ = made(tree, tmp_path, "overlap.action=remove", f"out={tmp_path / 'o'}")
    assert sorted(pair.id for pair in pairs) == ["own/p0", "own/p4"]
    assert counts(report) == {"read": 5, "kept": 2, "overlap": 3} and report.sources[0].overlaps == overlaps
    report, pairs, _ = made(tree, tmp_path, "overlap.action=remove", "overlap.ngram=30", f"out={tmp_path / 'p'}")
    assert counts(report) == {"read": 5, "kept": 3, "overlap": 2}


def test_bad_rows_stop_the_run_or_are_quarantined(tmp_path):
    rows = [own(0), '{"id": "x", "question": "q", ', own(1, better="C"), own(0), own(2, better=None), own(3)]
    tree = simple(tmp_path, rows)
    path = tree["sources"][0]["path"]
    with pytest.raises(BadRow, match=f"{path}:2: not JSON"):
        made(tree, tmp_path)
    assert not (tmp_path / "out/pairs.jsonl").exists()
    tree["sources"].append({"path": write(tmp_path / "good.jsonl", [own(7)])})
    report, pairs, _ = made(tree, tmp_path, "on_bad_row=quarantine")
    assert sorted(pair.id for pair in pairs) == ["good/p7", "own/p0", "own/p3"]
    assert [(source.read, source.kept, source.rejected) for source in report.sources] == [(6, 2, 4), (1, 1, 0)]
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects-own.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["field"]) for reject in rejects] == [
        (2, None),
        (3, "better"),
        (4, "id"),
        (5, "better"),
    ]
    assert "a pair to train on needs better" in rejects[3]["reason"]
    assert not (tmp_path / "out/rejects-good.jsonl").exists()


def test_the_counts_of_random_rows_reconcile(tmp_path):
    random_ = random.Random(0)
    for trial in range(20):
        rows = []
        for _ in range(random_.randrange(1, 60)):
            k = random_.randrange(12)
            answers = {f"response_{side}": random_.choice(["", f"a{k}", f"b{k}"]) for side in "ab"}
            row = own(k, random_.choice(["A", "B", "B", None]), id=random_.randrange(500), kind=random_.choice("xyz"))
            rows.append(random_.choice([row | answers, row, row, "{"]))
        rows.append(own(99, kind="x"))
        tree = simple(tmp_path, rows, where={"kind": ["x", "y"]}, count=random_.randrange(1, 40), shuffle=trial)
        tree["overlap"] = {"action": "remove", "benchmarks": [write(tmp_path / "bench.jsonl", [own(3)])]}
        try:
            report, pairs, _ = made(tree, tmp_path, "on_bad_row=quarantine", f"out={tmp_path / str(trial)}")
        except InputError as error:
            assert "no pair is left" in str(error)
            continue
        got = counts(report)
        assert got["read"] == len(rows) and got["kept"] == len(pairs)
        assert got["read"] == got["kept"] + sum(got.get(reason, 0) for reason in DROPPED)
        aside = tmp_path / str(trial) / "rejects-own.jsonl"
        assert got.get("rejected", 0) == (len(aside.read_text().splitlines()) if aside.exists() else 0)
        assert abs(2 * report.a - len(pairs)) <= 1


# ---- configs and files ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources is empty"),
        (
            {"sources": [{"path": "a/x.jsonl"}, {"path": "b/x.parquet"}]},
            "two are named x; give each a `name` of its own",
        ),
        ({"sources": [{"path": "o/n@v1"}, {"path": "n"}]}, "two are named n"),
        ({"sources": [{"path": "x", "name": "a b"}]}, "name='a b' of 'x' must be letters"),
        ({"sources": [{"path": "x", "format": "rm-bench"}]}, "format='rm-bench' must be one of auto, pairs, skywork"),
        ({"sources": [{"path": "x", "count": 0}]}, "sources.0.count: Input should be greater than 0 (got 0)"),
        (
            {"sources": [{"path": "x", "shuffle": 1}]},
            "source x: shuffle=1 is the seed that draws `count` rows; give count",
        ),
        ({"sources": [{"path": "x", "shufle": 1}]}, "unknown key sources.0.shufle; did you mean sources.0.shuffle?"),
        (
            {"sources": [{"path": "x", "exclude": {"source": "y"}}]},
            "sources.0.exclude.source: Input should be a valid tuple",
        ),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"on_bad_row": "skip"}, "on_bad_row: Input should be 'error' or 'quarantine' (got 'skip')"),
        ({"overlap": {"action": "drop"}}, "overlap.action: Input should be 'report' or 'remove' (got 'drop')"),
        ({"overlap": {"bench": []}}, "unknown key overlap.bench"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(tmp_path, change, message):
    assert message in error_of(made, {"out": "o", "sources": [{"path": "x"}], **change}, tmp_path)


def test_an_absent_benchmark_is_refused(tmp_path):
    tree = simple(tmp_path, [own(0)]) | {"overlap": {"benchmarks": [str(tmp_path / "none")]}}
    assert "is neither a file or folder nor a hub id" in error_of(made, tree, tmp_path)


def test_a_mixture_of_another_config_is_not_overwritten(tmp_path):
    rows = [own(k) for k in range(9)]
    made(simple(tmp_path, rows), tmp_path)
    before = (tmp_path / "out/pairs.jsonl").read_bytes()
    assert "holds a mixture made with another seed, overlap.ngram" in error_of(
        made, simple(tmp_path, rows), tmp_path, "seed=3", "overlap.ngram=9"
    )
    assert (tmp_path / "out/pairs.jsonl").read_bytes() == before
    (tmp_path / "out/mixture.json").write_text("[")
    assert "mixture.json is not what `rmr1 data mix` writes" in error_of(made, simple(tmp_path, rows), tmp_path)
    (tmp_path / "file").write_text("")
    assert "give an `out` that can be written" in error_of(
        made, simple(tmp_path, rows), tmp_path, f"out={tmp_path / 'file'}"
    )


def test_a_crash_leaves_no_incomplete_file(tmp_path, monkeypatch):
    out = tmp_path / "out"
    made(simple(tmp_path, [own(k) for k in range(9)]), tmp_path)
    before = (out / "pairs.jsonl").read_bytes()
    tree = simple(tmp_path, [own(k) for k in range(50)])
    real = mixture._row
    for wrong, caught in ((OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)):
        left = 20

        def fails(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise wrong  # noqa: B023
            return real(*args)

        monkeypatch.setattr(mixture, "_row", fails)
        with pytest.raises(caught):
            made(tree, tmp_path)
        assert (out / "pairs.jsonl").read_bytes() == before and not (out / "mixture.json").exists()
    monkeypatch.undo()
    assert len(made(tree, tmp_path)[1]) == 50 and sorted(p.name for p in out.iterdir()) == [
        "mixture.json",
        "pairs.jsonl",
    ]


def test_the_command(paper, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(paper))
    assert cli.main(["data", "mix", str(tmp_path / "config.yaml"), "sources.1.count=10"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["source", "read", "kept", "filtered", "not", "drawn", "better", "in", "A"]
    assert [line.split()[:5] for line in shown[1:5]] == [
        ["sky", "200", "150", "50", "0"],
        ["code", "100", "10", "0", "90"],
        ["math", "41", "41", "0", "0"],
        ["all", "341", "201", "50", "90"],
    ]
    assert shown[4].endswith("50.2%") and shown[5].startswith("written: ")
    assert cli.main(["data", "mix", str(tmp_path / "config.yaml"), "seed=5"]) == 2
    assert "made with another sources, seed" in capsys.readouterr().err


def test_the_command_imports_no_heavy_library(paper, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(paper))
    command = ["data", "mix", str(tmp_path / "config.yaml")]
    run = f"import sys, rmr1_jax.cli.main as c; c.main({command}); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout
    assert not {"jax", "transformers", "flax", "huggingface_hub"} & set(out.splitlines()[-1].split())
