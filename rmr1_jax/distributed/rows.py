"""A JSONL file to which all processes of a run append rows, so that a kill of any of them loses no row.

Process 0 appends to the file itself, process i to a part file of its own beside it (FILE.part-i). A row is on the disk
as soon as it is made, and no process waits for another until all are done; then process 0 moves the rows of the parts
into the file. A run that was killed leaves its parts: the next one, of any number of processes, begins by moving them
into the file. A row is recognised by its key, so that a kill in the middle of that leaves no row twice.

All processes must see the same directory, which is checked at the start. Next: `judge/file.py` and
`data/chains/chains.py`, which write such files.
"""

from __future__ import annotations

import re
import socket
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from rmr1_jax.distributed.exchange import from_first, gather, this_process, wait_idle
from rmr1_jax.errors import InputError
from rmr1_jax.files.append import append_rows, lock_for_writing, resume_rows, settings_file
from rmr1_jax.files.write import write_whole

Item = TypeVar("Item")
T = TypeVar("T")

SHARED_SECONDS = 10.0  # how long a network file system may take to show the file of another host


class SharedRows(Generic[Item]):
    """The rows of one file. In a run of one process there are no part files.

    Args:
        path, settings, command: as for `resume_rows`.
        parse: converts a row; raises ValueError, KeyError or TypeError for a row that this file cannot hold.
        add: called with each converted row: on all processes with those of earlier runs, then on each process with its
            own, and at the end on process 0 with those of the others. Raises as `parse` does.
        key: what tells a converted row from all others, such as its id.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        parse: Callable[[dict[str, Any]], Item],
        add: Callable[[Item], None],
        key: Callable[[Item], Hashable],
        command: str,
    ):
        self.path, self.settings, self.command = path, settings, command
        self._parse, self._add, self._key = parse, add, key
        self._keys: set[Hashable] = set()
        index, self._count = this_process()
        self._own = _part(path, index) if index else path

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the files, take over the rows of earlier runs, and prepare for `append` (a collective).

        Raises:
            InputError: as `resume_rows` does, another run is writing the file, or the processes do not share its
                directory.
        """
        with ExitStack() as stack:
            mark = from_first(lambda: self._lock(stack))
            self._check_shared(mark)
            earlier = from_first(self._resume)
            if self._own != self.path:
                for item in earlier:
                    self._take(item)
                stack.enter_context(lock_for_writing(self._own))
                resume_rows(self._own, self.settings, self._parse, command=self.command)  # writes its settings
            yield

    def append(self, *rows: dict[str, Any], sync: bool = True) -> None:
        """Append rows that this process made; see `append_rows`."""
        append_rows(self._own, rows, sync=sync)
        for row in rows:
            self._take(self._parse(row))

    def finish(self, then: Callable[[], T]) -> T:
        """Wait until all processes are here, move all rows into the file, and call `then` in process 0. Returns its
        value on all processes (a collective)."""
        append_rows(self._own, [])  # wait for the disk
        wait_idle(f"rmr1/rows/{self.path}")

        def merge() -> T:
            for part in self._parts():
                self._move(part)
            return then()

        return from_first(merge)

    def _take(self, item: Item) -> None:
        self._add(item)
        self._keys.add(self._key(item))

    def _lock(self, stack: ExitStack) -> str:
        """Lock the file and write a mark beside it, which the other processes must see."""
        stack.enter_context(lock_for_writing(self.path))
        mark = uuid.uuid4().hex
        if self._count > 1:
            write_whole(self._mark_file, mark)
        return mark

    def _check_shared(self, mark: str) -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while not (seen := self._count == 1 or self._reads(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        hosts = gather(None if seen else socket.gethostname())

        def check() -> None:
            self._mark_file.unlink(missing_ok=True)
            if apart := ", ".join(f"process {i} on {host}" for i, host in enumerate(hosts) if host):
                raise InputError(
                    f"{self.path}: {apart} cannot read what process 0 on {socket.gethostname()} writes there; give an "
                    "output in a directory that all processes share"
                )

        from_first(check)

    def _reads(self, mark: str) -> bool:
        with suppress(OSError):
            return self._mark_file.read_text() == mark
        return False

    @property
    def _mark_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.shared")

    def _resume(self) -> list[Item]:
        """Read the file, and move the rows of the parts of earlier runs into it. Returns all items."""
        items: list[Item] = []

        def take(row: dict[str, Any]) -> None:
            items.append(self._parse(row))
            self._take(items[-1])

        resume_rows(self.path, self.settings, take, command=self.command)
        for part in self._parts():
            with lock_for_writing(part):
                items += self._move(part)
        return items

    def _parts(self) -> list[Path]:
        """The part files on the disk, in the order of their numbers."""
        found = (re.fullmatch(rf"{re.escape(self.path.name)}\.part-(\d+)", p.name) for p in self.path.parent.iterdir())
        return [_part(self.path, number) for number in sorted(int(name[1]) for name in found if name)]

    def _move(self, part: Path) -> list[Item]:
        """Move the rows of a part into the file; those that are there already are left out."""
        items: list[Item] = []

        def move(row: dict[str, Any]) -> None:
            item = self._parse(row)
            if self._key(item) not in self._keys:
                self._take(item)
                append_rows(self.path, [row], sync=False)
                items.append(item)

        resume_rows(part, self.settings, move, command=self.command)
        append_rows(self.path, [])  # on the disk before the part is removed
        part.unlink()
        settings_file(part).unlink(missing_ok=True)
        return items


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.part-{number}")
