"""Judging in several processes: the files of one process, after kills too, and by other numbers of processes."""

import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from chat_server import ChatServer, Reply
from eval_data import write_rows
from hosts import free_port, start
from policies import answer, prefers

from rmr1_jax.prompts.prompt import Prompt, save_prompt

WORKER = Path(__file__).resolve().parents[1] / "support/command_worker.py"
PROMPT = Prompt(name="short", system=None, single_turn=("", "\nA: ", "\nB: ", "\nWhich?"), multi_turn=("", "\n", ""))
PAIRS = 64
ROWS = {"judge": "verdicts.jsonl", "eval": "judgements.jsonl", "chains": "answers.jsonl"}


@pytest.fixture(scope="module")
def folder(tiny_policy, tmp_path_factory) -> Path:
    """A model, a prompt, and pairs as RewardBench has them and in our own format."""
    folder = tmp_path_factory.mktemp("judging")
    tiny_policy.save(folder / "model")
    save_prompt(PROMPT, folder / "prompt.yaml")
    draw = random.Random(0)
    words = [" ".join(draw.choices("abcdefghij", k=draw.randint(1, 12))) for _ in range(3 * PAIRS)]
    pairs = [words[k : k + 3] for k in range(0, len(words), 3)]
    subsets = ("mt-bench-hard", "hep-java")
    write_rows(
        folder / "rewardbench.jsonl",
        (
            {
                "prompt": f"name {k}: {q}",
                "chosen": f"good {a}",
                "rejected": f"bad {b}",
                "id": k,
                "subset": subsets[k % 2],
            }
            for k, (q, a, b) in enumerate(pairs)
        ),
    )
    write_rows(
        folder / "pairs.jsonl",
        (
            {"id": f"p{k}", "question": q, "response_a": f"A{a}", "response_b": f"B{b}", "better": "AB"[k % 2]}
            for k, (q, a, b) in enumerate(pairs)
        ),
    )
    return folder


def command(folder: Path, name: str, out: Path) -> list[str]:
    """A command that writes into the directory `out`."""
    judge = ["--model", folder / "model", "--prompt", folder / "prompt.yaml", "--dtype", "float32"]
    judge += ["--max-new-tokens", 24, "--batch-size", 24]
    if name == "judge":
        found = ["judge", *judge, "--input", folder / "pairs.jsonl", "--output", out / "verdicts.jsonl"]
    elif name == "eval":
        data = ["--data", folder / "rewardbench.jsonl", "--out", out, "--forced-budgets"]
        found = ["eval", "rewardbench", *judge, *data, "--both-orders"]
    else:
        config = {
            "pairs": str(folder / "pairs.jsonl"),
            "out": str(out),
            "prompt": str(folder / "prompt.yaml"),
            "policy": {"model": str(folder / "model"), "dtype": "float32", "max_new_tokens": 24, "batch_size": 24},
            "tries": 3,
        }
        path = out.with_name(f"{out.name}.yaml")
        path.write_text(json.dumps(config))
        found = ["data", "chains", path]
    return list(map(str, found))


class Processes:
    """A command in `count` processes that share eight devices."""

    def __init__(self, folder: Path, name: str, out: Path, count: int, seconds: float = 0.0):
        self.rows, port = out / ROWS[name], free_port()
        self.count = count
        line = [sys.executable, str(WORKER), str(seconds), *command(folder, name, out)]
        self.all = [start(line, i, count, port, 8 // count, RMR1_LOST_TIMEOUT="10") for i in range(count)]

    def finish(self) -> list[str]:
        """Wait for the end; returns what each process printed."""
        said = [process.communicate(timeout=600)[0] for process in self.all]
        assert [process.returncode for process in self.all] == [0] * self.count, "\n".join(said)
        return said

    def kill(self, index: int, at_least: int) -> None:
        """Kill a process when there are that many rows, and wait for the end of the others."""
        deadline = time.monotonic() + 600
        while len(written(self.rows)) < at_least:
            assert all(process.poll() is None for process in self.all) and time.monotonic() < deadline
            time.sleep(0.02)
        self.all[index].send_signal(signal.SIGKILL)
        codes = {process.wait(timeout=300) for k, process in enumerate(self.all) if k != index}
        said = [process.communicate()[0] for process in self.all]
        assert codes <= {42, 134, -signal.SIGABRT}, (codes, said)


def written(path: Path) -> list[str]:
    """The whole lines of a file of rows and of its parts."""
    files = [path, *path.parent.glob(f"{path.name}.part-?")] if path.parent.exists() else []
    texts = [file.read_text() for file in files if file.exists()]
    return [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def files_of(out: Path) -> dict[str, str]:
    """Contents by path. The answers of teachers, which stay in the order in which they came, are sorted."""
    found = {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}
    found.pop("about.json", None)  # the time at which it was written
    if "answers.jsonl" in found:
        found["answers.jsonl"] = "".join(sorted(found["answers.jsonl"].splitlines()))
    return found


@pytest.fixture(scope="module")
def in_one(folder):
    """name -> the files of an uninterrupted run of one process."""
    found = {}

    def run(name: str) -> dict[str, str]:
        if name not in found:
            out = folder / f"{name}-one"
            Processes(folder, name, out, 1).finish()
            found[name] = files_of(out)
        return found[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_two_processes_write_the_files_of_one(folder, in_one, name):
    out = folder / f"{name}-two"
    first, second = Processes(folder, name, out, 2).finish()
    made = files_of(out)
    assert made == in_one(name)
    assert "written:" in first and "process 0 of 2" in first if name != "chains" else "pass 1, try 3" in first
    assert not re.search("written|pair/s|judge|pass|sampled", second), second
    assert name == "chains" or re.search(r"sampled (64|128) texts,.* on 2 processes with 4 devices .* each", first), (
        first
    )
    texts = [json.loads(line) for line in made[ROWS[name]].splitlines()] if name != "chains" else []
    assert name == "chains" or len({json.dumps(row.get("text", row.get("texts"))) for row in texts}) > PAIRS // 4
    if name == "eval":
        assert len(made["forced.jsonl"].splitlines()) > PAIRS // 4
    if name == "chains":
        assert len(made["chains.jsonl"].splitlines()) > PAIRS // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "chains"])
def test_three_kills_of_either_process_lose_and_repeat_nothing(folder, in_one, name):
    """Then one process finishes a copy of what the two began, and two finish the rest."""
    out = folder / f"{name}-killed"
    kept: list[str] = []
    for index, at_least in ((1, 8), (0, 25), (1, 45)):
        Processes(folder, name, out, 2, seconds=0.3).kill(index, max(at_least, len(kept) + 1))
        rows = written(out / ROWS[name])
        assert set(kept) < set(rows) and len(set(rows)) == len(rows)
        assert len({tuple(json.loads(row).get(k) for k in ("id", "pass", "try")) for row in rows}) == len(rows)
        kept = rows
    alone = folder / f"{name}-finished-by-one"
    shutil.copytree(out, alone)
    if name == "chains":
        command(folder, name, alone)
    for directory, count in ((out, 2), (alone, 1)):
        Processes(folder, name, directory, count).finish()
        assert set(kept) <= set(written(directory / ROWS[name]))
        assert files_of(directory) == in_one(name)


@pytest.mark.slow
def test_two_processes_finish_what_one_began(folder, in_one):
    out = folder / "begun-by-one"
    Processes(folder, "eval", out, 1, seconds=0.3).kill(0, 20)
    kept = written(out / ROWS["eval"])
    Processes(folder, "eval", out, 2).finish()
    assert set(kept) <= set(written(out / ROWS["eval"])) and len(kept) < PAIRS
    assert files_of(out) == in_one("eval")


@pytest.mark.slow
def test_two_processes_share_the_requests_to_an_endpoint(folder):
    def script(request, number):
        return prefers("Paris")(request["messages"][-1]["content"], number)

    made = {}
    with ChatServer(script, key=None) as server:
        for count in (1, 2):
            out, port, before = folder / f"endpoint-{count}", free_port(), len(server.log)
            judge = ["--judge", "endpoint", "--base-url", server.url, "--model", "m", "--key-variable", ""]
            line = [sys.executable, str(WORKER), "0", "eval", "injection", *judge, "--limit", "30", "--out", str(out)]
            both = [start(line, i, count, port) for i in range(count)]
            said = [process.communicate(timeout=300)[0] for process in both]
            assert [process.returncode for process in both] == [0] * count, said
            made[count] = files_of(out)
            asked = [json.dumps(request["messages"]) for request, _, _ in server.log[before:]]
            assert len(asked) == len(made[count]["judgements.jsonl"].splitlines()) > 30
    assert made[1] == made[2] and "clean pairs:" in said[0] and "pairs" not in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("refused", [{"p3"}, {"p3", "p4", "p6"}])
def test_pairs_that_an_endpoint_refuses_to_any_process_are_told_once_and_asked_again(folder, refused):
    """Process 1 asks about p3, process 0 about p4 and p6. Both exit with 1, after all other pairs have their rows."""
    questions = {row["question"]: row["id"] for row in map(json.loads, (folder / "pairs.jsonl").open())}
    state = {"refused": refused}

    def script(request, number):
        text = request["messages"][-1]["content"]
        [asked] = {name for question, name in questions.items() if text.startswith(f"{question}\nA: ")}
        return Reply("filtered", status=403) if asked in state["refused"] else answer("A")

    out = folder / f"refused-{len(refused)}"
    with ChatServer(script, key=None) as server:
        judge = ["--judge", "endpoint", "--base-url", server.url, "--model", "m", "--key-variable", ""]
        judge += ["--prompt", folder / "prompt.yaml", "--batch-size", "24"]
        files = ["--input", folder / "pairs.jsonl", "--output", out / "verdicts.jsonl"]
        line = list(map(str, [sys.executable, WORKER, "0", "judge", *judge, *files]))

        def run() -> tuple[list[int], list[str]]:
            port, before = free_port(), len(server.log)
            both = [start(line, i, 2, port) for i in range(2)]
            said = [process.communicate(timeout=300)[0] for process in both]
            return [*(process.returncode for process in both), len(server.log) - before], said

        codes, said = run()
        assert codes == [1, 1, PAIRS], said
        count = f"{len(refused)} pair{'s' * (len(refused) > 1)} ({len(refused)} refused)"
        assert said[0].count("error: ") == 1 and f"no answer for {count}" in said[0] and "403: filtered" in said[0]
        assert "error" not in said[1] and "written" not in said[0] + said[1], said
        ids = [json.loads(row)["id"] for row in written(out / "verdicts.jsonl")]
        assert len(ids) == PAIRS - len(refused) and set(ids) == set(questions.values()) - refused

        state["refused"] = set()
        codes, said = run()
        assert codes == [0, 0, len(refused)] and "written" in said[0], said
    rows = [json.loads(row) for row in (out / "verdicts.jsonl").open()]
    assert [row["id"] for row in rows] == list(questions.values()) and {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
def test_directories_that_are_not_shared_and_mistakes_are_told_once(folder):
    """Both processes exit with 2; the first one prints the error."""
    port = free_port()
    lines = [[sys.executable, str(WORKER), "0", *command(folder, "judge", folder / f"apart-{i}")] for i in (0, 1)]
    both = [start(line, i, 2, port) for i, line in enumerate(lines)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert re.search(r"error: .*verdicts.jsonl: process 1 on \S+ cannot read what process 0 on \S+ writes", said[0])
    assert "error" not in said[1]
    assert sorted(p.name for p in (folder / "apart-0").iterdir()) == ["verdicts.jsonl"]


@pytest.mark.slow
def test_sigterm_at_one_process_stops_both(folder, in_one):
    out = folder / "stopped"
    run = Processes(folder, "judge", out, 2, seconds=0.3)
    while len(written(out / ROWS["judge"])) < 10:
        time.sleep(0.05)
    run.all[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in run.all]
    assert [process.returncode for process in run.all] == [42, 42], said
    Processes(folder, "judge", out, 2).finish()
    assert files_of(out) == in_one("judge")
