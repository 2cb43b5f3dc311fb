"""Small sources for `rmr1 data mix`, and one call that mixes them and reads the result."""

import json

import pytest
import yaml

from rmr1_jax.config import load_config
from rmr1_jax.data.mix.mixture import MixtureConfig, mix
from rmr1_jax.data.mix.sources import DROPPED
from rmr1_jax.errors import InputError
from rmr1_jax.pairs.read import read_pairs

SOURCES = ("helpsteer2", "wildguard", "magpie_ultra", "offsetbias")


def said(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def skywork(k: int) -> dict:
    turns = (f"question {k}",) if k % 5 else (f"hello {k}", "hi", f"question {k}")
    sides = {"chosen": said(*turns, f"good {k}"), "rejected": said(*turns, f"bad {k}")}
    return {**sides, "source": SOURCES[k % 4]}


def code(k: int) -> dict:
    return {"instruction": "i", "input": f"write {k}", "accepted": f"right {k}", "rejected": f"wrong {k}", "ID": k}


def math_step(k: int) -> dict:
    full = {"full_chosen": f"so {k}", "full_rejected": f"so {k + 1}"}
    return {"prompt": f"is {k}?", "initial_reason_steps": "step\n", "chosen": "x", "rejected": "y", **full, "answer": k}


def own(k: int, better: str = "A", **more) -> dict:
    return {"id": f"p{k}", "question": f"q{k}", "response_a": f"a{k}", "response_b": f"b{k}", "better": better, **more}


def made(tree, tmp_path, *overrides):
    """Mix, and return the report, the pairs and the content of mixture.json."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(MixtureConfig, path, overrides)
    report = mix(config)
    assert all(source.reconciles for source in report.sources)
    out = config.out
    with open(f"{out}/mixture.json", encoding="utf-8") as file:
        return report, list(read_pairs(f"{out}/pairs.jsonl")), json.load(file)


def simple(tmp_path, rows, **more):
    """The tree of a config with one source of rows in the project's own format."""
    return {"out": str(tmp_path / "out"), "sources": [{"path": write(tmp_path / "own.jsonl", rows), **more}]}


def counts(report) -> dict[str, int]:
    """The counts of a mixture's only source, without zeros."""
    (source,) = report.sources
    names = ("read", "kept", *DROPPED, "both_empty")
    return {name: count for name in names if (count := getattr(source, name))}


def error_of(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value)
