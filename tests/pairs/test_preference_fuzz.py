"""2,750 damaged preference rows of all formats, in files of all kinds: each is read as a second reader reads it, or is
refused with its place; read = kept + rejected.

The second reader (`Second`) is written apart from the package, from the table in `pairs/README.md`.
"""

import csv
import gzip
import io
import json
import random
import re
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutate import WEIRD, mutate_value

from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import BadRow, ReadReport

ASKED, HELLO = "What is 2 + 3?", "Hello."
FILES, DAMAGED, SOUND = 25, 10, 12  # files of a format, and rows of a file; 8 formats of files, one of which is 16


def said(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


BRIEF = [{"role": "system", "content": "Be brief."}]
PREFERENCES = (
    lambda k: {"id": f"p{k}", "question": ASKED, "response_a": f"a{k}", "response_b": "b", "better": "AB"[k % 2]},
    lambda k: {"id": f"p{k}", "question": ASKED, "chosen": f"a{k}", "rejected": "b", "more": {"x": [k]}},
    lambda k: {"id": f"p{k}", "conversation_a": said(ASKED, f"a{k}"), "conversation_b": said(ASKED, "b")},
    lambda k: {"prompt": ASKED, "chosen": f"a{k}", "rejected": "b"},
    lambda k: {"prompt": said(ASKED), "chosen": said(ASKED, f"a{k}")[1:], "rejected": said(ASKED, "b")[1:]},
    lambda k: {"prompt": BRIEF + said(HELLO, "Hi.", ASKED), "chosen": f"a{k}", "rejected": "b", "source": "s"},
    lambda k: {"chosen": BRIEF + said(ASKED, f"a{k}"), "rejected": BRIEF + said(ASKED, "b"), "margin": 1.5},
    lambda k: {"prompt": HELLO, "chosen": said(HELLO, "Hi.", ASKED, f"a{k}"), "rejected": said(HELLO, "b"), "n": k},
    lambda k: {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: a{k}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: b"},
    lambda k: {"chosen": f"{ASKED} It is {k}.", "rejected": f"{ASKED} Hm"},
    lambda k: {"system": "Be brief.", "input": ASKED, "chosen_response": f"a{k}", "rejected_response": "b"},
    lambda k: {"instruction": ASKED, "response_a": f"a{k}", "response_b": "b", "winner": "Response A", "rubric": "r"},
    lambda k: {"prompt": ASKED, "response_1": f"a{k}", "response_2": "b", "preference_strength": k % 7 - 3},
    lambda k: {"context": said(ASKED), "response1": f"a{k}", "response2": "b", "overall_preference": -1},
    lambda k: {"conversation_a": said(ASKED, f"a{k}"), "conversation_b": said(ASKED, "b"), "winner": "tie"},
    lambda k: {
        "prompt": [{"role": "user", "content": parts("What is ", "2 + 3?")}],
        "chosen": [{"role": "assistant", "content": parts(f"a{k}")}],
        "rejected": {"role": "assistant", "content": "b"},
    },
)
FORMATS = {
    "preferences": lambda k: PREFERENCES[k % len(PREFERENCES)](k),
    "rewardbench": lambda k: {"prompt": ASKED, "chosen": f"a{k}", "rejected": "b", "subset": "hep-cpp", "id": k},
    "rewardbench-2": lambda k: {
        **{"id": f"i{k}", "prompt": ASKED, "chosen": [f"a{k}"], "rejected": ["b", "c", "d"], "subset": "Math"},
        **{"num_correct": 1, "num_incorrect": 3},
    },
    "rm-bench": lambda k: {"id": k, "prompt": ASKED, "chosen": list("abc"), "rejected": list("def"), "domain": "chat"},
    "skywork": lambda k: {"chosen": said(ASKED, f"a{k}"), "rejected": said(ASKED, "b"), "source": "s"},
    "code-preference": lambda k: {"input": f"task {k}", "accepted": "def f(): 1", "rejected": "def f(", "ID": k},
    "math-step": lambda k: {
        **{"prompt": ASKED, "initial_reason_steps": "Step 1: ", "full_chosen": f"{k}", "full_rejected": "y"},
        **{"dataset": "d", "answer": "5"},
    },
    "rmb": lambda k: {
        **{"pair_uid": f"u{k}", "conversation_input": said(ASKED), "category_path": "Pairwise/x"},
        **{"chosen": {"llm_name": "m", "answer": f"a{k}"}, "reject": {"llm_name": "n", "answer": "b"}},
    },
}
ODD = (
    *("A", "B", "tie", "model_a", "Response B", "user", "assistant", "system", "tool", "x" * 200_000, "half \ud83d"),
    *(float("nan"), said(ASKED, "a"), said(ASKED), BRIEF, [BRIEF], parts("x"), [{"type": "image_url"}], "p1", "3"),
    *("\n\nHuman: hi\n\nAssistant: ho", "Human: hi", [ASKED], "[1, 2]", "[{'role': 'user', 'content': 'x'}]"),
)
NAMES = ("prompt", "question", "chosen", "rejected", "response_a", "id", "Chosen", "system", "winner", "tool_calls")


class Refused(Exception):
    """The second reader refuses a row."""


def check(condition) -> None:
    if not condition:
        raise Refused


class Second:
    """Reads a row, as a file gave it: the id and the conversations; (better, other) if known, else (first, second)."""

    def __init__(self, name: str, number: int, row: dict):
        self.row, self.have = row, {key: value for key, value in row.items() if value is not None}
        self.number = number
        self.pairs = getattr(self, name.replace("-", "_"))()

    def text(self, value) -> str:
        check(isinstance(value, str) and not re.search("[\ud800-\udfff]", value))
        return value

    def identity(self, value) -> str:
        check(isinstance(value, int | str) and not isinstance(value, bool) and value != "")
        return self.text(str(value))

    @property
    def id(self) -> str:
        return self.identity(self.have["id"]) if "id" in self.have else str(self.number)

    def talk(self, value, last="a") -> list:
        turns = []
        check(isinstance(value, list))
        for message in value:
            check(isinstance(message, dict) and {"role", "content"} <= message.keys() and not message.get("tool_calls"))
            content = message["content"]
            if isinstance(content, list):
                kinds = ("text", "input_text", "output_text")
                check(all(isinstance(part, dict) and part.get("type") in kinds for part in content))
                content = "".join(self.text(part.get("text")) for part in content)
            check(message["role"] in ("system", "user", "assistant"))
            turns.append((message["role"], self.text(content)))
        check(re.fullmatch("(su)?[ua]*", "".join(role[0] for role, _ in turns)))
        check(turns and turns[-1][0][0] == last)
        return turns

    def need(self, *names) -> list:
        check(set(names) <= self.have.keys())
        return [self.text(self.have[name]) for name in names]

    def single(self, asked, *answers) -> list:
        return [[("user", asked), ("assistant", answer)] for answer in answers]

    # ---- the sets ----

    def rewardbench(self):
        check("id" in self.have)
        subset, *texts = self.need("subset", "prompt", "chosen", "rejected")
        return [(f"{subset}/{self.id}", True, self.single(*texts))]

    def rewardbench_2(self):
        [asked] = self.need("prompt")
        lists = [self.have.get(name) for name in ("chosen", "rejected")]
        check(all(isinstance(value, list) and value for value in lists))
        chosen, rejected = (list(map(self.text, value)) for value in lists)
        check(self.row.get("num_correct", len(chosen)) == len(chosen))
        name = f"{self.text(self.have['subset'])}/{self.id}" if "subset" in self.have else self.id
        both = [(i, j) for i in range(len(chosen)) for j in range(len(rejected))]
        return [(f"{name}#{i}-{j}", True, self.single(asked, chosen[i], rejected[j])) for i, j in both]

    def rm_bench(self):
        check("id" in self.have)
        asked, _ = self.need("prompt", "domain")
        lists = [self.have.get(name) for name in ("chosen", "rejected")]
        check(all(isinstance(value, list) and len(value) == 3 for value in lists))
        chosen, rejected = (list(map(self.text, value)) for value in lists)
        both = [(i, (i + file) % 3) for file in range(3) for i in range(3)]
        return [(f"{self.id}#{i}-{j}", True, self.single(asked, chosen[i], rejected[j])) for i, j in both]

    def skywork(self):
        check({"chosen", "rejected"} <= self.row.keys())
        return [(self.id, True, [self.talk(self.row[side]) for side in ("chosen", "rejected")])]

    def code_preference(self):
        return [(self.id, True, self.single(*self.need("input", "accepted", "rejected")))]

    def math_step(self):
        asked, steps, *ends = self.need("prompt", "initial_reason_steps", "full_chosen", "full_rejected")
        return [(self.id, True, self.single(asked, *(steps + end for end in ends)))]

    def rmb(self):
        kind = "pair_uid" if "pair_uid" in self.row else "bon_uid"
        [category] = self.need("category_path")
        check(kind in self.have)
        name, asked = (
            f"{category}#{self.identity(self.have[kind])}",
            self.talk(self.have.get("conversation_input"), "u"),
        )
        pairwise = kind == "pair_uid"
        best = self.have.get("chosen" if pairwise else "bon_best")
        others = [self.have.get("reject")] if pairwise else self.have.get("loser_list")
        check(isinstance(others, list) and others)
        check(all(isinstance(each, dict) and "answer" in each for each in (best, *others)))
        best, *others = ([*asked, ("assistant", self.text(each["answer"]))] for each in (best, *others))
        return [(name if pairwise else f"{name}-{k}", True, [best, other]) for k, other in enumerate(others)]

    # ---- preferences ----

    def preferences(self):
        name, have = self.id, self.have
        own = [("response_a", "response_b"), ("chosen", "rejected"), ("conversation_a", "conversation_b")]
        found = [sides for sides in own if sides[0] in have or sides[1] in have]
        if not found:
            more = [("chosen_response", "rejected_response"), ("response_1", "response_2"), ("response1", "response2")]
            found = [sides for sides in more if sides[0] in have or sides[1] in have][:1]
        check(len(found) == 1 and set(found[0]) <= have.keys())
        [sides] = found
        ranked = sides[0].startswith("chosen")
        talks = self.with_system(self.talks(sides, ranked), sides)
        label = have.get("better") if not ranked or have.get("better") == "tie" else None
        if label is not None:
            check(label in ("A", "B", "tie"))
        elif isinstance(have.get("winner"), str):
            squeezed = re.sub("[^a-z]", "", have["winner"].lower())
            for prefix in ("model", "response", "assistant"):
                squeezed = squeezed.removeprefix(prefix)
            label = {"a": "A", "b": "B"}.get(squeezed, "tie" if "tie" in squeezed else None)
        elif sides[0] in ("response_1", "response1"):
            for key in ("overall_preference", "preference_strength"):
                if key in have and label is None:
                    try:
                        number = float(have[key])
                    except (TypeError, ValueError, OverflowError):
                        raise Refused from None
                    check(abs(number) <= 3)
                    label = "tie" if number == 0 else "A" if number < 0 else "B"
        if label == "tie" or not (ranked or label):
            return [(name, False, talks)]
        return [(name, True, talks if ranked or label == "A" else talks[::-1])]

    def with_system(self, talks, sides):
        if "system" not in self.have or not self.text(self.have["system"]).strip():
            return talks
        system = ("system", self.have["system"])
        check(all(talk[0][0] != "system" or talk[0] == system for talk in talks))
        return [talk if talk[0][0] == "system" else [system, *talk] for talk in talks]

    def talks(self, sides, ranked) -> list:
        values = [self.have[side] for side in sides]
        if sides[0] == "conversation_a":
            return list(map(self.talk, values))
        heads = [value[0] if isinstance(value, list) and value else {} for value in values]
        whole = all(isinstance(head, dict) and head.get("role") in ("user", "system") for head in heads)
        names = ["question", "prompt"] if whole else ["question", "prompt", "instruction", "input", "context"]
        if not set(names) & self.have.keys():
            check(whole or not set(names) & self.row.keys())
            if ranked and all(isinstance(value, str) for value in values):
                return self.implicit(*map(self.text, values))
            talks = [self.talk([value] if isinstance(value, dict) else value) for value in values]
            check(all(talk[0][0] != "assistant" for talk in talks))
            return talks
        name = next(name for name in names if name in self.have)
        asked = self.have[name]
        if isinstance(asked, list):
            asked = self.talk(asked, "u")
        else:
            asked, more = self.text(asked), self.have.get("input")
            if name == "instruction" and isinstance(more, str) and more:
                asked = f"{asked}\n{self.text(more)}"
            turns = self.dialogue(asked)
            asked = turns[:-1] if len(turns) > 1 and turns[-1] == ("assistant", "") else [("user", asked)]
        return [self.answered(asked, value) for value in values]

    def answered(self, asked, value) -> list:
        if not isinstance(value, list | dict):
            return [*asked, ("assistant", self.text(value))]
        talk = self.talk([value] if isinstance(value, dict) else value)
        if talk[0][0] == "assistant":
            return asked + talk
        if talk[: len(asked)] == asked:
            return talk
        bare, spoken = ([turn for turn in turns if turn[0] != "system"] for turns in (asked, talk))
        said = [content.strip() for role, content in spoken if role == "user"]
        check(spoken[: len(bare)] == bare or (len(bare) == 1 and bare[0][1].strip() in said))
        return asked[:1] + talk if asked[0][0] == "system" and talk[0][0] != "system" else talk

    def dialogue(self, text) -> list:
        if not re.match(r"\s*(Human|Assistant):", text):
            return []
        turns = re.split(r"\n\n\s*(?=Human:|Assistant:)", "\n\n" + text.lstrip())[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [(roles[turn.split(":")[0]], turn.split(":", 1)[1].strip()) for turn in turns]

    def implicit(self, first, second) -> list:
        turns = [self.dialogue(first), self.dialogue(second)]
        if any(turns):
            check(all(each and each[0][0] == "user" and each[-1][0] == "assistant" for each in turns))
            return turns
        check(not first.startswith(second) and not second.startswith(first))
        end = next(k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        while end and first[end - 1].isalnum() and (first[end].isalnum() or second[end].isalnum()):
            end -= 1
        end -= bool(end and first[end - 1] == " ")
        check(first[:end].strip())
        return [[("user", first[:end]), ("assistant", text[end:])] for text in (first, second)]


# ---- files ----


def damage(rng: random.Random, row: dict) -> dict:
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind, names = rng.choice(["value"] * 5 + ["rename", "set", "messages", "case"]), list(row)
        if kind == "value" or not names:
            row = mutate_value(rng, row, ODD)
        elif kind == "rename":
            name = rng.choice(names)
            row = {rng.choice(NAMES) if key == name else key: value for key, value in row.items()}
        elif kind == "set":
            row = {**row, rng.choice(NAMES): rng.choice([*WEIRD, *ODD])}
        elif kind == "case":
            name = rng.choice(names)
            row = {key.upper() if key == name else key: value for key, value in row.items()}
        else:
            lists = [name for name in names if isinstance(row[name], list)]
            row = row | {name: rng.sample(row[name], len(row[name])) for name in lists}
    return row


def cell(value) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


def write(folder, kind: str, rows: list[dict]):
    """Write the rows. Returns the path, and the rows as a reader gets them; None for one that is no row."""
    content = [json.dumps(row) for row in rows]
    packed = kind.endswith(".gz")
    path = folder / f"rows.{kind}"
    given = [json.loads(text) for text in content]
    if kind.startswith("csv"):
        header = [name for name in dict.fromkeys(name for row in rows for name in row) if name == name.strip() != ""]
        file = io.StringIO(newline="")
        csv.writer(file).writerows([header, *([cell(row.get(name)) for name in header] for row in rows)])
        path.write_bytes(gzip.compress(file.getvalue().encode(), 1) if packed else file.getvalue().encode())
        given = []
        for row in rows:
            cells = {name: cell(row.get(name)) for name in header}
            try:
                begins = {
                    name: re.match(r"""\[\{["'](role|content)["']:""", text.replace(" ", ""))
                    for name, text in cells.items()
                }
                given.append({name: json.loads(text) if begins[name] else text or None for name, text in cells.items()})
            except ValueError:
                given.append(None)
    elif kind == "parquet":
        try:
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, path)
            given = table.to_pylist()
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            return write(folder, "jsonl", rows)
    else:
        text = "\n".join(content) + "\n" if "jsonl" in kind else f"[{', '.join(content)}]"
        path.write_bytes(gzip.compress(text.encode(), 1) if packed else text.encode())
    return path, given


def second_reading(name: str, rows: list) -> tuple[list, set[int]]:
    """The pairs of all rows, and the numbers of the rows that are refused."""
    found, refused, seen = [], set(), set()
    for number, row in enumerate(rows):
        try:
            check(row is not None)
            pairs = Second(name, number, row).pairs
            check(not seen & {id for id, *_ in pairs})
        except Refused:
            refused.add(number)
            continue
        seen |= {id for id, *_ in pairs}
        found += pairs
    return found, refused


def shown(pair) -> tuple:
    sides = [list(map(tuple, pair.conversation_a)), list(map(tuple, pair.conversation_b))]
    return pair.id, pair.better is not None, sides[::-1] if pair.better == "B" else sides


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_preference_rows(name, tmp_path):
    kinds = ["jsonl", "json", "jsonl.gz", "json.gz", "csv", "csv.gz", "parquet"]
    lists = name in ("rewardbench-2", "rm-bench", "rmb")  # which a cell of a table cannot hold
    kept = refused = 0
    files = FILES * (4 if name == "preferences" else 1)
    for case in range(files):
        rng = random.Random(f"{name}/{case}")
        kind = kinds[case % 4 if lists and case % 7 in (4, 5) else case % 7]
        rows = [FORMATS[name](rng.randrange(100)) for k in range(DAMAGED)]
        rows = [damage(rng, row) for row in rows] + [FORMATS[name](100 + k) for k in range(SOUND)]
        rng.shuffle(rows)
        folder = tmp_path / str(case)
        folder.mkdir()
        path, given = write(folder, kind, rows)
        report, rejects = ReadReport(), folder / "rejects.out"
        try:
            pairs = list(read_pairs(path, rejects=rejects, report=report))
        except Exception as error:
            pytest.fail(f"case {case}, {kind}: {error!r}\n{traceback.format_exc(limit=-4)}\n{path}")
        bad = [json.loads(line) for line in rejects.read_text().splitlines()]
        wanted, wrong = second_reading(name, given)
        has_lines = path.name.removesuffix(".gz").endswith(("jsonl", "csv"))
        assert all(reject["file"] == str(path) and bool(reject["line"]) == has_lines for reject in bad)
        assert all(len(reject["reason"]) >= len("is missing") for reject in bad)
        here, differing = f"case {case}, {path}", wrong ^ {reject["row"] for reject in bad}
        assert not differing, f"{here}: {[(k, str(given[k])[:700], bad) for k in differing]}"
        if bad:
            place = f"{path}:{bad[0]['line']}: " if has_lines else f"{path}, row {bad[0]['row']}: "
            with pytest.raises(BadRow, match=re.escape(place)):
                list(read_pairs(path))
        for pair, expected in zip(map(shown, pairs), wanted, strict=True):
            assert pair == expected, here
        assert report.read == report.kept + report.rejected == len(rows) and report.made == len(pairs)
        kept, refused = kept + report.kept, refused + report.rejected
    assert refused > files * DAMAGED / 10 and kept > files * SOUND, (kept, refused)
