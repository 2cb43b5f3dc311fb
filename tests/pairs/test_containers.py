"""The files that rows are read from: compressed with gzip, CSV, and endings that are not known."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.containers import read_rows, source_files
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import BadRow, ReadReport

ROWS = [{"prompt": f'Question {k},\nwith a "quote", é', "chosen": f"good {k}", "rejected": "bad"} for k in range(5)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, **how) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return file.getvalue()


CONTAINERS = {
    "rows.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "packed.jsonl": gzip.compress(jsonl(ROWS)),  # the content decides
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv": table(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + table(ROWS, lineterminator="\n"),
    "quoted.CSV": table(ROWS, quoting=csv.QUOTE_ALL),
    "rows.csv.gz": gzip.compress(table(ROWS)),
    "members.jsonl.gz": gzip.compress(jsonl(ROWS[:2])) + gzip.compress(jsonl(ROWS[2:])),
    "rows.txt": jsonl(ROWS),
    "bom.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + jsonl(ROWS)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_holds_the_same_rows(tmp_path, name):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / name).write_bytes(CONTAINERS[name])
    pairs = list(read_pairs(tmp_path / name))
    assert pairs == list(read_pairs(tmp_path / "rows.parquet")) and len(pairs) == 5
    assert [row.value["prompt"] for row in read_rows(tmp_path / name)] == [row["prompt"] for row in ROWS]


def test_cells(tmp_path):
    path = tmp_path / "rows.csv"
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q, é"}]
    rows = [
        {"": 0, "id": "x", "prompt": json.dumps(asked), "chosen": "[1, 2]", "rejected": "r", "n": ""},
        {"": 1, "id": "", "prompt": "[not messages]", "chosen": "c" * 200_000, "rejected": "\n\n", "n": "3"},
    ]
    path.write_bytes(table(rows))
    first, second = read_pairs(path)
    assert [tuple(message.values()) for message in asked] == list(map(tuple, first.conversation_a[:-1]))
    assert {first.response_a, first.response_b} == {"[1, 2]", "r"} and first.meta == {"n": None}
    assert second.question == "[not messages]" and second.id == "1" and second.meta == {"n": "3"}
    assert {second.response_a, second.response_b} == {"c" * 200_000, "\n\n"}


def test_a_row_of_a_table_names_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    python = "[{'role': 'user', 'content': 'q'}]"
    lines = [
        *(
            "prompt,chosen,rejected",
            '"two\nlines",c,r',
            "",
            "q,c",
            "q,,r",
            f'"{python}",c,r',
            "q,c,r,more",
            ",c,r",
            "q,c,r",
        ),
    ]
    path.write_text("\n".join(lines) + "\n")
    report, rejects = ReadReport(), tmp_path / "rejects.jsonl"
    pairs = list(read_pairs(path, rejects=rejects, report=report))
    assert [pair.question for pair in pairs] == ["two\nlines", "q"]
    assert (report.read, report.kept, report.rejected) == (7, 2, 5)
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(bad["line"], bad["field"]) for bad in found] == [
        *((5, None), (6, "chosen"), (7, "prompt"), (8, None), (9, "prompt")),
    ]
    assert found[0]["reason"] == "has 2 cells, and the header names 3 columns"
    assert found[1]["reason"] == "is null, expected a text"
    assert "begins like a list of messages, and is not JSON" in found[2]["reason"]
    with pytest.raises(BadRow, match=r"rows\.csv:5: has 2 cells"):
        list(read_pairs(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            b'prompt,chosen,rejected\nq,"c,r\nq,c,r\n',
            r"rows\.csv:3: not CSV \(.*\); is a quotation mark mis",
        ),
        ("rows.csv", b'prompt,chosen,rejected\nq,"c"x,r\n', r"rows\.csv:2: not CSV"),
        (
            "rows.csv",
            b"prompt;chosen;rejected\nq;c;r\n",
            r"rows\.csv:1: the header is the one column .*separate columns",
        ),
        ("rows.csv", b"prompt,chosen,chosen\nq,c,r\n", r"rows\.csv:1: the header names the column 'chosen' twice"),
        ("rows.csv", b"prompt,chosen,rejected\nq,c,\xff\n", r"rows\.csv:2: not UTF-8 at byte 4 of the line"),
        ("rows.csv", b"", "holds no rows"),
        ("rows.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS))[:-9], "not a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS))[:20], "not a whole gzip file"),
        ("rows.jsonl.gz", b"\x1f\x8bnothing", "not a whole gzip file"),
        ("rows.json.gz", gzip.compress(b"[1, 2")[:-2], r"rows\.json\.gz: not a whole gzip file"),
        ("rows.json.gz", gzip.compress(b"[1, 2"), r"rows\.json\.gz: not JSON"),
        (
            "rows.tsv",
            b"prompt\tchosen\trejected\n",
            r"ending '\.tsv' is not known; files that are read: \.jsonl, .*\.csv",
        ),
        ("rows", b"prompt\n", "ending '' is not known"),
        ("rows.parquet", gzip.compress(b"x"), "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for options in ({}, {"rejects": tmp_path / "rejects"}):
        with pytest.raises(InputError, match=message) as caught:
            list(read_pairs(tmp_path / name, **options))
        assert str(caught.value).count(name) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"a": 1, "rows": ROWS}, indent=1).encode(),
            "is one JSON object ('a', 'rows'), .*in its field 'rows'",
        ),
        (json.dumps({"a": {"b": 1}}, indent=1).encode(), "is one JSON object ('a'), expected a row a line or an array"),
        (gzip.compress(json.dumps({"a": 1}, indent=1).encode()), "is one JSON object ('a')"),
        (zipped(jsonl(ROWS)), "is a zip archive; unpack it"),
        (b"PAR1....", "is a Parquet file; name it .parquet"),
        (lzma.compress(jsonl(ROWS)), "is compressed with xz; unpack it"),
        (bz2.compress(jsonl(ROWS)), "is compressed with bzip2; unpack it"),
        (b"\x28\xb5\x2f\xfd....", "is compressed with zstd; unpack it"),
    ],
)
def test_what_a_file_holds_is_said(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        list(read_rows(path))


def test_a_damaged_first_line_is_a_row_that_is_bad(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{oops\n" + jsonl(ROWS))
    bad, *others = read_rows(path)
    assert isinstance(bad, BadRow) and [row.value for row in others] == ROWS


def test_a_folder_is_not_read_twice(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[:2])))
    (tmp_path / "more.csv").write_bytes(table(ROWS[2:]))
    assert [file.name for file in source_files(tmp_path)] == ["more.csv", "train.jsonl.gz"]
    assert len(list(read_pairs(tmp_path))) == 5
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    assert [file.name for file in source_files(tmp_path)] == ["train.jsonl"]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """40 MB of rows, a few kB when they are compressed, in a process of its own."""
    rows = [{"prompt": "q" * 100_000, "chosen": f"c{k}", "rejected": "r"} for k in range(400)]
    (tmp_path / name).write_bytes(gzip.compress(jsonl(rows) if "jsonl" in name else table(rows), compresslevel=1))
    script = """if True:
        import resource, sys
        from rmr1_jax.pairs.read import read_pairs
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before, count = peak(), sum(1 for _ in read_pairs(sys.argv[1]))
        print(count, peak() - before)
    """
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    count, grown = map(int, run.stdout.split())
    assert count == 400 and grown * (1 if sys.platform == "darwin" else 1024) < 20e6
