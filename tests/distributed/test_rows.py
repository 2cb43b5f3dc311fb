"""Tests of files that several processes write: nothing is lost or made twice, whoever is killed and whoever goes on.

Threads stand for processes here; `tests/judge/test_processes.py` has real ones.
"""

import json
import random

import pytest
from threads import Threads

from rmr1_jax.distributed import rows as module
from rmr1_jax.distributed.rows import SharedRows
from rmr1_jax.errors import InputError
from rmr1_jax.files.append import lock_for_writing

IDS = [str(k) for k in range(40)]
SETTINGS = {"model": "m"}


class Killed(BaseException):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(number of processes, killed: {process: after how many rows}, settings) -> what each process returned or raised.
    Each makes the rows of its share that the file lacks."""

    def make(count, killed=None, settings=SETTINGS, path=tmp_path / "rows.jsonl"):
        def process(index):
            done, mine = set(), 0

            def add(name):
                assert name not in done
                done.add(name)

            rows = SharedRows(path, settings, parse=lambda row: row["id"], add=add, key=str, command="test")
            with rows.open():
                for name in IDS[index::count]:
                    if name in done:
                        continue
                    if mine == (killed or {}).get(index):
                        raise Killed
                    rows.append({"id": name, "made_by": f"{index} of {count}"}, sync=False)
                    mine += 1
                return rows.finish(lambda: sorted(done))

        return Threads(monkeypatch, count, module).run(process)

    return make


def written(folder):
    """The ids in all files of rows."""
    files = sorted(folder.glob("rows.jsonl*"))
    lines = [
        line for f in files if not f.name.endswith((".run.json", ".shared")) for line in f.read_text().splitlines()
    ]
    return [json.loads(line)["id"] for line in lines]


def test_all_rows_are_in_one_file_and_all_processes_get_the_result(run, tmp_path):
    assert run(3) == [sorted(IDS)] * 3
    assert sorted(written(tmp_path)) == sorted(IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.run.json"]
    made_by = {json.loads(line)["made_by"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()}
    assert made_by == {"0 of 3", "1 of 3", "2 of 3"}


@pytest.mark.parametrize("seed", range(8))
def test_any_process_is_killed_and_any_number_goes_on(run, tmp_path, seed):
    draw, kept = random.Random(seed), []
    for _ in range(3):
        count = draw.randint(1, 4)
        found = run(count, {i: draw.randrange(4) for i in range(count)})
        assert any(isinstance(each, Killed) for each in found)
        rows = written(tmp_path)
        assert len(set(rows)) == len(rows) and set(kept) <= set(rows)
        kept = rows
    count = draw.randint(1, 5)
    assert run(count) == [sorted(IDS)] * count
    assert sorted(written(tmp_path)) == sorted(IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.run.json"]


def test_a_kill_at_any_moment_of_the_merge_leaves_no_row_twice(run, tmp_path, monkeypatch):
    for name, moments in {"append_rows": (0, 3, 5, 6, 9, 12), "unlink": range(5)}.items():
        for moment in moments:
            run(3, {0: 4, 1: 5, 2: 6})
            steps = [0]

            def dying(real, steps=steps, moment=moment):
                def step(*args, **options):
                    steps[0] += 1
                    if steps[0] > moment:
                        raise Killed
                    return real(*args, **options)

                return step

            with monkeypatch.context() as patch:
                if name == "unlink":
                    patch.setattr(module.Path, "unlink", dying(module.Path.unlink))
                else:
                    patch.setattr(module, "append_rows", dying(module.append_rows))
                run(1)
            left = written(tmp_path)
            assert len(left) >= 14
            assert run(2) == [sorted(IDS)] * 2
            assert sorted(written(tmp_path)) == sorted(IDS)
            for path in tmp_path.iterdir():
                path.unlink()


def test_the_incomplete_last_line_of_a_part_is_cut(run, tmp_path):
    run(2, {0: 3, 1: 3})
    part = tmp_path / "rows.jsonl.part-1"
    part.write_bytes(part.read_bytes() + b'{"id": "39", "ma')
    assert run(1) == [sorted(IDS)] and sorted(written(tmp_path)) == sorted(IDS)


def test_parts_of_other_settings_are_refused_by_all_and_stay(run, tmp_path):
    run(2, {0: 0, 1: 3})
    before = (tmp_path / "rows.jsonl.part-1").read_bytes()
    first, second = run(2, settings={"model": "other"})
    assert isinstance(first, InputError) and "part-1 was made with other settings (model was 'm'" in str(first)
    assert isinstance(second, SystemExit) and second.code == 2  # the first one prints the error
    assert (tmp_path / "rows.jsonl.part-1").read_bytes() == before
    assert run(1) == [sorted(IDS)]


def test_a_file_or_part_that_another_run_writes_is_refused(run, tmp_path):
    run(2, {0: 1, 1: 1})
    for name in ("rows.jsonl", "rows.jsonl.part-1"):
        with lock_for_writing(tmp_path / name):
            first, second = run(2)
        assert isinstance(first, InputError) and f"{name}: another run is writing it" in str(first)
        assert isinstance(second, SystemExit) and second.code == 2
    assert run(2) == [sorted(IDS)] * 2


def test_processes_without_a_shared_directory_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARED_SECONDS", 0.3)

    def process(index):
        path = tmp_path / str(index) / "rows.jsonl"
        path.parent.mkdir()
        with SharedRows(path, SETTINGS, parse=str, add=print, key=str, command="test").open():
            raise AssertionError

    first, second, third = Threads(monkeypatch, 3, module).run(process)
    assert isinstance(first, InputError)
    assert "process 1 on " in str(first) and "process 2 on " in str(first) and "give an output in a dir" in str(first)
    assert second.code == third.code == 2
    assert [p.name for p in (tmp_path / "0").iterdir()] == ["rows.jsonl"]


def test_an_error_of_the_first_process_is_raised_once(monkeypatch):
    def process(index):
        return module.from_first(lambda: json.loads("{"))

    first, second = Threads(monkeypatch, 2, module).run(process)
    assert isinstance(first, ValueError) and isinstance(second, SystemExit) and second.code == 1
