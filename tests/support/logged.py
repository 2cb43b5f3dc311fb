"""Reads back what the loggers wrote: event files with TensorBoard's reader, offline runs of W&B with its records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7  # of the LevelDB log format, which .wandb files have after 7 bytes of their own


def events_of(directory: Path) -> dict[int, dict[str, float]]:
    """The scalars of `directory/tensorboard` by step and tag. Fails for a step that is there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    values: dict[int, dict[str, float]] = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            assert tag not in values.setdefault(event.step, {}), (tag, event.step)
            values[event.step][tag] = event.value
    return values


def offline_history(directory: Path) -> tuple[list[str], list[tuple[int, dict[str, float]]]]:
    """The ids of the offline runs in `directory/wandb`, and the logged values of all steps in their order. Waits until
    W&B's own process has written the end of the newest run: `finish` returns before."""
    from wandb.proto.wandb_internal_pb2 import Record

    def records(path: Path) -> list[Record]:
        return [Record.FromString(data) for data in _records(path.read_bytes())]

    def ended() -> bool:
        newest = max(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime, default=None)
        return newest is not None and any(r.WhichOneof("record_type") == "exit" for r in records(newest))

    deadline = time.monotonic() + 60
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    ids, rows = [], []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                step = items.pop("_step", record.history.step.num)
                rows.append((step, {k: v for k, v in items.items() if not k.startswith("_")}))
    return ids, rows


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: a record lies in one or more pieces, none of which crosses the end of a block."""
    at, piece = HEADER, b""
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last piece
            yield piece
            piece = b""
