"""scripts/gpu_check.py: every part on a CPU with tiny shapes, and a failure of one case loses no other."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """Imports a file of scripts/ by its name."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == SCRIPTS:
            del sys.modules[name]


CASES = [
    ("gpu_parity", "versions", "all", ["device", "packages", "imports", "cudnn", "copy", "product"]),
    ("gpu_attention", "attention", "4,2,64", ["xla 4,2,64 T=64", "xla 4,2,64 T=128"]),
    ("gpu_speed", "sft", "0.5b", ["0.5b 2x128 full"]),
    ("gpu_speed", "decode", "7b,64,8", ["7b prefill 8x64", "7b 8 slots, n=2"]),
    ("gpu_stages", "grpo", "1.5b", ["1.5b 1x128, 16 groups"]),
    pytest.param("gpu_parity", "model", "loss", None, marks=pytest.mark.slow),
    pytest.param("gpu_parity", "model", "greedy", ["greedy tokens, float32"], marks=pytest.mark.slow),
    pytest.param("gpu_stages", "quickstart", "all", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("file", "part", "case", "names"), CASES)
def test_a_part_on_a_cpu(scripts, tmp_path, file, part, case, names):
    rows = list(scripts(file).PARTS[part](case, out=tmp_path, tiny=True))
    assert names is None or [row["name"] for row in rows] == names
    assert all(row.get("ok") is not False for row in rows) and json.dumps(rows)
    if part in ("sft", "decode", "grpo"):
        assert rows[-1]["tokens_s"] > 0 and 0 < rows[-1]["busy"] <= 1 and rows[-1]["compile_s"] > 0
        listed = (tmp_path / "operations.txt").read_text()
        assert "== " in listed and " ms " in listed and "x  " in listed


def test_the_cases_are_those_of_the_parts(scripts):
    check, names = scripts("gpu_check"), ("gpu_parity", "gpu_attention", "gpu_speed", "gpu_stages")
    assert {case.part for case in check.CASES} == {part for name in names for part in scripts(name).PARTS}
    assert len({case[:2] for case in check.CASES}) == len(check.CASES)
    assert [case.name for case in check.chosen(["model", "decode:7b,64"])] == ["greedy", "7b,64", "loss"]


def test_the_shares_of_kinds_of_kernels(scripts):
    names = {"nvjet_sm90_tst": 3, "gemm_fusion_dot_7": 1, "void cudnn::fusion::simple_memset<float>": 2, "Memset 0": 1}
    totals = {(name, "where"): [ms, 1] for name, ms in names.items()} | {("loop_add_fusion", ""): [1.0, 9]}
    shares = scripts("gpu_trace").shares(totals)
    assert shares == {"products": 0.5, "cudnn": 0.25, "copies": 0.125, "other": 0.125}


def test_the_tables(scripts):
    device = {"part": "versions", "case": "all", "name": "device", "kind": "NVIDIA X", "driver": "1.2", "tb_s": 3.3153}
    sft = {"part": "sft", "ok": True, "mfu": 0.42459, "ms": 330.803, "attention": "xla"}
    text = scripts("gpu_table").markdown([
        device,
        sft | {"case": "a", "name": "one"},
        {"part": "decode", "case": "a", "name": "a step", "ok": True, "tokens_s": 12345.6},
        sft | {"case": "b", "name": "two", "ok": False, "mfu": 0.0},
        {"part": "sft", "case": "c", "error": "stopped after 9 s"},
        {"part": "sft", "case": "d", "name": "three", "ok": False, "failed": "no memory"},
    ])  # fmt: skip
    assert text.splitlines() == [
        "NVIDIA X, driver 1.2; 3.32 TB/s",
        *("", "| sft | MFU | ms | attention |", "| --- | --- | --- | --- |"),
        *("| one | 42.5% | 331 | xla |", "| two | 0.0% | 331 | xla |"),
        *("", "| decode | tokens/s |", "| --- | --- |", "| a step | 12,346 |"),
        *("", "Missing or wrong:", "", "- `sft:b`, two: wrong"),
        *("- `sft:c`: stopped after 9 s", "- `sft:d`, three: no memory"),
    ]


CHILD = """
import json, sys, time
part = sys.argv[sys.argv.index("--child") + 1].partition(":")[0]
with open(sys.argv[sys.argv.index("--rows") + 1], "w") as file:
    if part != "empty":
        print(json.dumps({"name": "one", "ok": part != "wrong", "ms": 1234.5}), file=file)
if part == "broken":
    print("no memory is left")
    sys.exit(3)
if part == "slow":
    time.sleep(60)
"""


def test_a_failure_loses_one_case(scripts, tmp_path, monkeypatch, capsys):
    check = scripts("gpu_check")
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "child.py"))
    parts = ("good", "broken", "slow", "empty", "wrong")
    monkeypatch.setattr(check, "CASES", tuple(check.Case(part, "all", 2 if part == "slow" else 30) for part in parts))
    assert check.main(["--out", str(tmp_path / "out")]) == 1
    rows = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [(row["part"], row.get("error")) for row in rows] == [
        ("good", None),
        *[("broken", None), ("broken", "exit code 3: no memory is left")],
        *[("slow", None), ("slow", "stopped after 2 s")],
        ("empty", "no result"),
        ("wrong", None),
    ]
    printed = capsys.readouterr().out
    assert "ms=1,234" in printed and "FAILED stopped after 2 s" in printed
    assert check.main(["--out", str(tmp_path / "out"), "--only", "good"]) == 0
    assert check.main(["--out", str(tmp_path / "out"), "--only", "wrong"]) == 1
    assert check.main(["--out", str(tmp_path / "out"), "--only", "good", "--minutes", "0.1"]) == 1
    assert "left out: the 0.1 minutes are over" in capsys.readouterr().out
    assert check.main(["--only", "nothing", "--out", str(tmp_path / "out")]) == 2
