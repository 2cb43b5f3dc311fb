"""The page of a prepared set: every number in it, why rows were left out, and nothing of the data that is not text."""

import json
import re
from html.parser import HTMLParser

import pytest
from prepared import config_of, rows, write_rows

from rmr1_jax.data.prepare import prepare
from rmr1_jax.errors import InputError
from rmr1_jax.report.prepared import prepared_page
from rmr1_jax.report.report import write_report

HOSTILE = '<script>alert("x")</script>&'


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, world_tokenizer):
    directory = tmp_path_factory.mktemp("data")
    made = rows(30)
    for row in made[:10]:
        row["source"] = HOSTILE
    made[4] = {k: v for k, v in made[4].items() if k != "source"}
    made[20]["context_messages"][1]["content"] = "far " * 300
    made[21]["context_messages"][1]["content"] = "far " * 400
    made[22]["winner"] = "model_a"
    made[23]["winner"] = 7
    made[24]["id"] = HOSTILE
    made[25]["id"] = HOSTILE
    settings = {"on_bad_row": "quarantine", "on_too_long": "drop", "max_length": 500}
    data = write_rows(directory / "rows.jsonl", made)
    prepare(config_of(model=str(world_tokenizer), data=str(data), out=str(directory / "set"), **settings))
    return directory / "set"


class Text(HTMLParser):
    """The words of a page and the elements in it."""

    def __init__(self, page: str):
        super().__init__()
        self.words, self.tags, self.attributes = [], set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_all_numbers_and_loads_nothing(prepared, tmp_path):
    out = write_report([prepared], tmp_path / "report.html")
    page = out.read_text(encoding="utf-8")
    found = Text(page)
    words = " ".join(" ".join(found.words).split())
    assert "Read Kept Rejected Too long Not sampled Rows 30 25 3 2 0" in words
    assert f"{HOSTILE} 9 36.0%" in words and "not named 1 4.0%" in words
    assert "A 13 52.0%" in words and "B 12 48.0%" in words
    assert "longer than max_length=…: … tokens first: r20: longer than max_length=500: " in words
    assert "its winner is a side" in words and "winner: is … (int), expected a text" in words
    assert "script" not in found.tags and not found.attributes & {"src", "onerror", "onclick"}
    assert HOSTILE not in page and "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "href" not in found.attributes and not re.search(r"url\(|@import", page)
    assert page.count("<figure>") == 3


def test_the_histogram_counts_every_row(prepared):
    [found] = prepared_page([("set", prepared)])["sets"]
    manifest = json.loads((prepared / "prepared.json").read_bytes())
    for histogram in found["histograms"]:
        assert sum(int(words.rsplit(" ", 1)[1]) for *_, words in histogram["bars"]) == 25
        assert all(width > 0 and height > 0 for _, _, width, height, _ in histogram["bars"])
    assert found["histograms"][0]["facts"]["longest"] == str(manifest["lengths"]["tokens"]["max"])
    assert sum(entry["rows"] for entry in found["reasons"]) == 5
    assert found["reasons"][0]["rows"] == 2  # the most frequent first


def test_two_sets_on_one_page_and_no_mixture(prepared, tmp_path):
    page = write_report([prepared, prepared.parent / "set"], tmp_path / "one.html").read_text(encoding="utf-8")
    assert page.count("Lengths, in tokens") == 1  # one given twice counts once
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    with pytest.raises(InputError, match="run is not a prepared set"):
        write_report([prepared, tmp_path / "run"], tmp_path / "two.html")


def test_a_manifest_that_is_not_ours(prepared, tmp_path):
    manifest = json.loads((prepared / "prepared.json").read_bytes())
    lengths = manifest["lengths"]
    for changes in (
        {"lengths": {"tokens": {}}},
        {"lengths": {"tokens": lengths["tokens"] | {"edges": [0]}}},
        {"lengths": lengths | {"other": lengths["tokens"]}},
        {"sources": 3},
        {"better": {"A": "many"}},
        {"config": None},
        {"counts": {"kept": None}},
    ):
        (tmp_path / "prepared.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(InputError, match=r"prepared\.json: not what `rmr1 data prepare` writes"):
            write_report([tmp_path], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
