"""2,000 damaged data files through every reader: rows, or an error with the place; no row is lost in silence."""

import json
import random
import traceback
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate import mutate_bytes, mutate_json, mutate_value

from rmr1_jax.errors import InputError
from rmr1_jax.eval.evaluate import load, score_logs
from rmr1_jax.eval.logs import FLAG, read_judgements
from rmr1_jax.files.append import resume_rows
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import ReadReport
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.prompt import get_prompt, load_prompt, save_prompt

ROWS = 5
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHERS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
ODD = ("A", "B", "model_a", "user", "assistant", "[[A]]", "</think>", "<|im_end|>", MESSAGES, [MESSAGES], "é" * 3, 7)


def asked(number: int) -> list[dict[str, str]]:
    return get_prompt("cor").render(f"What is {number}?", f"It is {number}.", "I do not know.")


def answer(text: str) -> dict[str, str]:
    return {"llm_name": "m", "answer": text}


FORMATS = {
    "answers": lambda k: {
        "id": f"p{k}",
        "question": "q",
        "response_a": f"a{k}",
        "response_b": "b",
        "better": "AB"[k % 2],
    },
    "chosen": lambda k: {"id": f"p{k}", "question": "q", "chosen": f"a{k}", "rejected": "b", "more": {"x": [k]}},
    "conversations": lambda k: {"id": k, "conversation_a": MESSAGES, "conversation_b": OTHERS, "better": None},
    "skywork": lambda k: {"chosen": MESSAGES, "rejected": OTHERS, "source": f"s{k}"},
    "code-preference": lambda k: {"input": f"task {k}", "accepted": "def f(): ...", "rejected": "def f(", "ID": k},
    "math-step": lambda k: {
        **{"prompt": f"2 + {k}", "initial_reason_steps": "Step 1: ", "full_chosen": "x", "full_rejected": "y"},
        **{"dataset": "d", "answer": str(k)},
    },
    "rewardbench": lambda k: {"prompt": f"q{k}", "chosen": "a", "rejected": "b", "subset": "hep-cpp", "id": k},
    "rm-bench": lambda k: {
        "id": k,
        "prompt": "q",
        "chosen": ["a", "b", "c"],
        "rejected": ["d", "e", "f"],
        "domain": "chat",
    },
    "rmb": lambda k: {
        **{"pair_uid": f"u{k}", "conversation_input": MESSAGES[:1], "category_path": "Pairwise/x"},
        **{"chosen": answer("a"), "reject": answer("b")},
    },
    "rmb best-of-n": lambda k: {
        **{"bon_uid": f"u{k}", "conversation_input": MESSAGES[:1], "category_path": "BoN/x"},
        **{"bon_best": answer("a"), "loser_list": [answer("b"), answer("c")]},
    },
    "published": lambda k: {"context_messages": asked(k), "winner": "model_a" if k % 2 else "x <answer>[[A]]</answer>"},
    "chains": lambda k: {
        **{"context_messages": asked(k), "winner": f"x{k} <answer>[[B]]</answer>", "id": f"c{k}", "source": "s"},
        **{"better": "B", "pass": 1},
    },
}
NAMED = {"answers": "auto", "chosen": "auto", "conversations": "auto", "rmb best-of-n": "rmb"}


def read(name: str, path: Path, **options):
    if name in ("published", "chains"):
        return read_published(path, **options)
    return read_pairs(path, NAMED.get(name, name), **options)


def write_parquet(path: Path, rows: list) -> bool:
    """Return whether the rows fit into a table; damaged ones may have columns of several types."""
    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), path)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return False
    return True


def damaged_file(rng: random.Random, name: str, folder: Path) -> tuple[Path, int | None]:
    """Write a file with one damage. Returns the number of the damaged row, where only that row may differ."""
    rows = [FORMATS[name](k) for k in range(ROWS)]
    form, place = rng.choice(["jsonl", "jsonl", "json", "parquet"]), rng.randrange(ROWS)
    path = folder / f"rows.{form}"
    if form == "parquet":
        changed = [*rows[:place], mutate_value(rng, rows[place], ODD), *rows[place + 1 :]]
        if rng.random() < 0.5 and write_parquet(path, changed):
            return path, None
        assert write_parquet(path, rows)
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return path, None
    texts = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    kind = rng.choice(["row", "row", "row bytes", "file", "twice"])
    if kind == "row":
        texts[place] = mutate_json(rng, rows[place], ODD)
    elif kind == "row bytes":
        texts[place] = mutate_bytes(rng, texts[place])
    elif kind == "twice":
        texts.insert(rng.randrange(ROWS), texts[place])
    content = b"\n".join(texts) + b"\n" if form == "jsonl" else b"[" + b",\n".join(texts) + b"]"
    if kind == "file":
        content = mutate_bytes(rng, content)
    path.write_bytes(content)
    return path, place if kind == "row" and form == "jsonl" else None


def rows_in(path: Path) -> int:
    """Count the rows of the file by a second, independent reading."""
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).metadata.num_rows
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        return len(json.loads(content))
    return sum(bool(line.strip()) for line in content.split(b"\n"))


def read_damaged(name: str, path: Path, place: int | None) -> str:
    """Read the file with and without rejects, check what the reader promises, and return the outcome."""
    report, rejects = ReadReport(), path.parent / "rejects.jsonl"
    reader = partial(read, name, path)
    try:
        items = list(reader(rejects=rejects, report=report))
    except InputError as error:
        assert str(path) in str(error), f"the error does not say where: {error}"
        with pytest.raises(InputError):
            list(reader())
        return "refused"
    rejected = [json.loads(line) for line in rejects.read_bytes().splitlines()]
    assert report.read == report.kept + report.rejected == rows_in(path)
    assert len(rejected) == report.rejected and all(row["reason"] and row["file"] == str(path) for row in rejected)
    assert report.made == len(items)
    if place is not None:
        _untouched_rows_are_there(name, path, place, items, {row["row"] for row in rejected})
    try:
        assert list(map(str, reader())) == list(map(str, items)) and not rejected
    except InputError as error:
        assert rejected and str(path) in str(error)
    return "rejected" if rejected else "kept"


def _untouched_rows_are_there(name, path, place, items, rejected) -> None:
    sound = path.with_name("sound.jsonl")
    sound.write_text("".join(json.dumps(FORMATS[name](k)) + "\n" for k in range(ROWS)))
    found = [_content(item) for item in items]
    per_row, all_items = divmod(len(sound_items := list(read(name, sound))), ROWS)[0], sound_items
    for row in range(ROWS):
        if row != place and row not in rejected:
            for item in all_items[row * per_row : (row + 1) * per_row]:
                assert _content(item) in found, f"row {row} is lost or changed"


def _content(item) -> str:
    """The texts of an item, without the order of its answers and the name of its file."""
    if hasattr(item, "winner"):
        return f"{item.messages} {item.winner}"
    return f"{sorted([str(item.conversation_a), str(item.conversation_b)])}"


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_rows(name, tmp_path):
    outcomes = []
    for case in range(120):
        rng = random.Random(f"{name}/{name == 'published'}/{case}")
        folder = tmp_path / str(case)
        folder.mkdir()
        path, place = damaged_file(rng, name, folder)
        kept = folder / "kept.txt"
        try:
            outcomes.append(read_damaged(name, path, place))
        except Exception as error:
            pytest.fail(f"case {case}: {error!r}\n{traceback.format_exc(limit=-4)}\n{path}\n{path.read_bytes()[:2000]}")
        kept.unlink(missing_ok=True)
    assert min(outcomes.count(outcome) for outcome in ("kept", "rejected", "refused")) >= 5, outcomes


def test_a_repeated_key_is_a_bad_row(tmp_path):
    """One of its values would be lost without a word."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps(FORMATS["answers"](0))
    path.write_text(f'{row}\n{row[:-1]}, "better": "B"}}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*the key 'better' is repeated"):
        list(read_pairs(path))
    path.write_text(f'[{row}, {{"id": {{"x": 1, "x": 2}}}}]')
    with pytest.raises(InputError, match="the key 'x' is repeated"):
        list(read_pairs(path))


def test_a_flipped_bit_in_a_parquet_file_loses_no_row_in_silence(tmp_path):
    """Where the file lists its parts, one damaged bit can make the library pass over all rows without a word."""
    path = tmp_path / "rows.parquet"
    assert write_parquet(path, [FORMATS["rewardbench"](k) for k in range(ROWS)])
    sound, short = path.read_bytes(), 0
    footer = int.from_bytes(sound[-8:-4], "little")
    for at in range(len(sound) - 8 - footer, len(sound)):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            assert len(list(read_pairs(path, "rewardbench"))) == ROWS
        except InputError as error:
            assert str(path) in str(error)
            short += "could be read" in str(error)
    assert short, "no flip makes the file say more rows than it gives: nothing is tested"


def test_a_link_does_not_lead_out_of_a_folder_of_data(tmp_path):
    cache = tmp_path / "datasets--owner--name"
    folder, blobs = cache / "snapshots" / "0123" / "data", cache / "blobs"
    for new in (folder, blobs):
        new.mkdir(parents=True)
    row = json.dumps(FORMATS["answers"](0)) + "\n"
    (blobs / "abc").write_text(row)
    (folder / "rows.jsonl").symlink_to("../../../blobs/abc")
    assert len(list(read_pairs(folder))) == len(list(read_pairs(folder.parent))) == 1  # as the hub keeps its files
    (tmp_path / "private.jsonl").write_text(row)
    (folder / "more.jsonl").symlink_to(tmp_path / "private.jsonl")
    for path in (folder, folder.parent):
        with pytest.raises(InputError, match=r"more\.jsonl: is a link out of its directory"):
            list(read_pairs(path))
    assert len(list(read_pairs(folder / "more.jsonl"))) == 1  # a file that the user names is the user's choice


# ---- logs of judgements ----

JUDGED = {"winner": "A", "status": "ok", "correct": True, "votes": {"A": 1, "B": 0, "invalid": 0}}
OURS = {
    **{"id": "hep-cpp/1", "better": "A", **JUDGED, "question": "q", "response_a": "a", "response_b": "b"},
    **{"kind": "chat", "texts": [["<answer>[[A]]</answer>"]], "verdicts": [["A"]], "tokens": [[9]]},
    "meta": {"benchmark": "rewardbench", "subset": "hep-cpp", "id": 1, "section": "Reasoning", "number": 0},
}
ENTRY = {"text_chosen": MESSAGES, "text_rejected": OTHERS, "results": 1, "answers": "x [[B]]", FLAG: True}
EXTRA = {key: OURS[key] for key in (*JUDGED, "kind", "texts", "verdicts", "tokens")}
THREE = {"chosen": ["a"] * 3, "rejected": ["b"] * 3, "result": [1, 0, 1], "output": ["[[A]]"] * 3, FLAG: [False] * 3}
JUDGEBENCH = {"original_id": "o", "source": "mmlu-pro-law", "question": "q", "response_model": "m", "label": "A>B"}
JUDGEBENCH |= {"response_A": "a", "response_B": "b"}
LOGS = {
    "ours": ("rewardbench", "judgements.jsonl", lambda k: OURS | {"id": f"hep-cpp/{k}"}),
    "rewardbench": ("rewardbench", "logs.json", lambda k: {**ENTRY, "subset": "hep-cpp", "id": k, "rmr1": EXTRA}),
    "rm-bench": (
        *("rm-bench", "total_dataset_1_m.json"),
        lambda k: {"id": f"i{k}", "prompt": "q", "domain": "chat", **THREE, "rmr1": [EXTRA] * 3},
    ),
    "judgebench": (
        *("judgebench", "dataset=judgebench,response_model=m,judge_name=rmr1,judge_model=m.jsonl"),
        lambda k: {
            **JUDGEBENCH,
            "pair_id": f"p{k}",
            "judgments": [{"judgment": {"response": "x"}, "decision": "A>B"}, None],
        },
    ),
    "rmb": (
        "rmb",
        "logs.json",
        lambda k: {**ENTRY, "category_path": "Pairwise_set/Harmlessness/S1", "pair_uid": f"u{k}"},
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_damaged_logs(name, tmp_path):
    benchmark, file, make = LOGS[name]
    outcomes = []
    for case in range(100):
        rng = random.Random(f"{name}/{case}")
        folder, rows = tmp_path / str(case), [make(k) for k in range(ROWS)]
        folder.mkdir()
        texts = [json.dumps(row).encode() for row in rows]
        for number in "123" if name == "rm-bench" else "1":  # RM-Bench is scored from its three files together
            (folder / file.replace("1", number)).write_bytes(b"[" + b",\n".join(texts) + b"]")
        place = rng.randrange(ROWS)
        texts[place] = mutate_json(rng, rows[place], ODD)
        content = b"\n".join(texts) + b"\n" if file.endswith("l") else b"[" + b",\n".join(texts) + b"]"
        path = folder / file
        path.write_bytes(content if rng.random() < 0.7 else mutate_bytes(rng, content))
        try:
            scores, failures = score_logs(benchmark, folder, folder / "out")
            assert scores or failures
        except InputError as error:
            scores, failures = {}, [error]
        except Exception as error:
            pytest.fail(f"case {case}: {error!r}\n{traceback.format_exc(limit=-5)}\n{path.read_bytes()[:3000]}")
        assert not failures or str(folder) in str(failures[0]), failures[0]
        outcomes.append("refused" if failures else "scored")
    assert outcomes.count("scored") >= 5 and outcomes.count("refused") >= 30, outcomes


def test_damaged_judgebench_rows(tmp_path):
    path, outcomes = tmp_path / "rows.jsonl", []
    for case in range(120):
        rng = random.Random(f"judgebench/{case}")
        texts = [json.dumps(JUDGEBENCH | {"pair_id": f"p{k}"}).encode() for k in range(ROWS)]
        texts[rng.randrange(ROWS)] = mutate_json(rng, JUDGEBENCH | {"pair_id": "p9"}, ODD)
        path.write_bytes(b"\n".join(texts) + b"\n")
        try:
            assert len(list(load("judgebench", path))) == ROWS
            outcomes.append("loaded")
        except InputError as error:
            assert str(path) in str(error)
            outcomes.append("refused")
    assert outcomes.count("loaded") >= 5 and outcomes.count("refused") >= 30


def test_damaged_files_that_a_run_continues(tmp_path):
    """Rows that a killed run appended, and their settings: taken up, or refused with the place; never overwritten."""
    rows = [{"id": f"p{k}", "status": "ok", "correct": True, "text": "é"} for k in range(ROWS)]
    settings = {"model": "m", "votes": 1, "deep": {"x": [1, 2]}}
    outcomes = []
    for case in range(100):
        rng = random.Random(f"taken/{case}")
        path = tmp_path / f"{case}.jsonl"
        side = path.with_name(path.name + ".run.json")
        texts = [json.dumps(row).encode() for row in rows]
        if rng.random() < 0.5:
            texts[rng.randrange(ROWS)] = mutate_json(rng, rows[0])
        content, told = b"\n".join(texts) + b"\n", json.dumps(settings).encode()
        if rng.random() < 0.3:
            told = mutate_json(rng, settings)
        elif rng.random() < 0.5:
            content = mutate_bytes(rng, content)
        path.write_bytes(content)
        side.write_bytes(told)
        try:
            found = resume_rows(path, settings, lambda row: (row["id"], row["status"]), command="rmr1 judge")
        except InputError as error:
            assert str(path) in str(error) and path.read_bytes() == content
            outcomes.append("refused")
        except Exception as error:
            pytest.fail(f"case {case}: {error!r}\n{traceback.format_exc(limit=-4)}\n{content[:2000]}\n{told[:2000]}")
        else:
            assert len(found) == content.count(b"\n") and content.startswith(path.read_bytes())
            outcomes.append("taken")
    assert outcomes.count("taken") >= 10 and outcomes.count("refused") >= 10


def test_damaged_prompt_files(tmp_path):
    path, outcomes = tmp_path / "p.yaml", []
    save_prompt(get_prompt("cor"), path)
    sound = path.read_bytes()
    for case in range(60):
        rng = random.Random(f"prompt/{case}")
        path.write_bytes(mutate_bytes(rng, sound))
        try:
            load_prompt(path).render("q", "a", "b")
            outcomes.append("loaded")
        except InputError as error:
            assert str(path) in str(error)
            outcomes.append("refused")
    assert outcomes.count("loaded") >= 5 and outcomes.count("refused") >= 5


def test_a_judgement_is_read_or_refused_with_its_place(tmp_path):
    path, refused = tmp_path / "judgements.jsonl", 0
    for case in range(80):
        rng = random.Random(f"judgement/{case}")
        path.write_bytes(mutate_json(rng, OURS, ODD) + b"\n" + json.dumps(OURS).encode() + b"\n")
        try:
            assert len(list(read_judgements(path))) == 2
        except InputError as error:
            assert f"{path}:1:" in str(error)
            refused += 1
    assert 20 <= refused <= 79
