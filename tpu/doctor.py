#!/usr/bin/env python3
"""Checks whether this machine, or every host of this slice, is ready to train.

    python tpu/doctor.py --out gs://BUCKET/runs              on a TPU host; of a slice, on all hosts at once
    python tpu/doctor.py --out DIR --platform cpu            on a laptop
    python tpu/doctor.py --out DIR --chips 16 --hosts 4      on a slice of exactly that size

The checks are: the versions of the packages; the start-up of all processes; that JAX runs on the expected platform and
did not fall back to the CPU; the number of devices and hosts; that the output directory (or bucket) can be written,
read and deleted from; and a sum over all devices of all hosts. Each prints one line with its time. The exit code is 0
if all succeed, else 1. On several hosts it waits `--timeout` seconds for the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator

PYTHON = (3, 11)
# The oldest supported versions. The newest for Python 3.11 are jax 0.10.2 and flax 0.12.8.
PACKAGES = {"jax": (0, 10), "jaxlib": (0, 10), "flax": (0, 12), "optax": (0, 2, 5), "orbax-checkpoint": (0, 12)}
LIBTPU = (0, 0, 42)  # 0.0.21 crashes with jax 0.10


class CheckFailed(Exception):
    """A check has failed. The message says what was found, and what to do."""


def versions(args: argparse.Namespace) -> str:
    wanted = PACKAGES | ({"libtpu": LIBTPU} if args.platform == "tpu" else {}) | {"rmr1-jax": (0,)}
    found, wrong = {}, []
    for name, oldest in wanted.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if _numbers(found[name]) < oldest:
            wrong.append(f"{name} {found[name]} is older than {'.'.join(map(str, oldest))}")
    if sys.version_info[:2] < PYTHON:
        wrong.append(f"Python {sys.version.split()[0]} is older than {'.'.join(map(str, PYTHON))}")
    if wrong:
        extra = "tpu" if args.platform == "tpu" else "cuda" if args.platform == "gpu" else ""
        raise CheckFailed(f"{'; '.join(wrong)}: pip install -U -e '.{f'[{extra}]' if extra else ''}'")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version}" for name, version in found.items())])


def start_up(args: argparse.Namespace) -> str:
    """Join the other hosts as a run does (`rmr1_jax/distributed/join.py`), before any use of devices."""
    import jax

    from rmr1_jax.distributed.join import join_processes

    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("RMR1_START_TIMEOUT", str(args.timeout))
    args.joined.enter_context(join_processes())
    if not jax.distributed.is_initialized():
        return "one process; the environment names no others"
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def platform(args: argparse.Namespace) -> str:
    import jax

    found = jax.default_backend()
    if found != args.platform:
        held = "; is another process holding the chips, and is libtpu installed?" if args.platform == "tpu" else ""
        raise CheckFailed(f"JAX runs on {found}, expected {args.platform}{held}")
    return f"{found}, {jax.devices()[0].device_kind}"


def devices(args: argparse.Namespace) -> str:
    import jax

    counts = (
        f"{jax.device_count()} in {jax.process_count()} processes, {jax.local_device_count()} of them here; "
        f"this is process {jax.process_index()}"
    )
    for name, wanted, found in (
        ("chips", args.chips, jax.device_count()),
        ("hosts", args.hosts, jax.process_count()),
    ):
        if wanted is not None and wanted != found:
            raise CheckFailed(f"{counts}; expected {wanted} {name}. Start it on every host, and check the slice")
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        # libtpu finds the chips of the slice by itself, so nothing fails before the first checkpoint.
        raise CheckFailed(
            f"{counts}; but the processes did not find each other: set RMR1_COORDINATOR, RMR1_PROCESSES, RMR1_PROCESS"
        )
    return counts


def output(args: argparse.Namespace) -> str:
    """Write, read and delete a file of this process: every host must be able to, on a mounted file system too."""
    from etils import epath

    path = epath.Path(args.out) / f".doctor-{uuid.uuid4().hex}"
    content = os.urandom(1 << 20)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        same = path.read_bytes() == content
        path.unlink()
    except Exception as e:  # the clients of buckets raise errors of their own
        raise CheckFailed(f"{args.out}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    if not same:
        raise CheckFailed(f"{args.out}: the bytes that were read are not those that were written")
    return f"{args.out}: 1 MiB written, read and deleted"


def all_hosts_sum(args: argparse.Namespace) -> str:
    """Sum the numbers of all devices: without a device or a link the sum is wrong, or never finishes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    count = jax.device_count()
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec("all"))
    numbers = jax.make_array_from_callback((count,), sharding, lambda at: np.arange(1, count + 1, dtype=np.float32)[at])
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    first = float(total(numbers))
    began = time.perf_counter()
    again = float(total(numbers))
    if first != again or first != count * (count + 1) / 2:
        raise CheckFailed(f"the sum of 1 to {count} came out as {first}, then as {again}")
    return f"{first:g} over {count} devices; {1000 * (time.perf_counter() - began):.1f} ms when compiled"


CHECKS = (versions, start_up, platform, devices, output, all_hosts_sum)


def examine(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Yield (success, line) of each check in turn. Any exception of a broken environment is a failed check."""
    for check in CHECKS:
        began = time.perf_counter()
        try:
            success, found = True, check(args)
        except CheckFailed as e:
            success, found = False, str(e)
        except Exception as e:
            success, found = False, f"{type(e).__name__}: {' '.join(str(e).split())}"
        seconds = time.perf_counter() - began
        yield (
            success,
            f"{'ok  ' if success else 'FAIL'} {check.__name__.replace('_', ' '):13} {seconds:6.1f} s  {found}",
        )
        if check is start_up and not success:
            return  # without all its hosts a slice does not respond to any other check


def _numbers(version: str) -> tuple[int, ...]:
    """Parse a version: `0.10.2rc1` -> (0, 10, 2)."""
    numbers = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the directory or gs:// bucket that runs will write to")
    parser.add_argument("--platform", choices=("tpu", "gpu", "cpu"), default="tpu", help="the expected platform")
    parser.add_argument("--chips", type=int, help="the expected number of devices, over all hosts")
    parser.add_argument("--hosts", type=int, help="the expected number of processes")
    parser.add_argument("--timeout", type=int, default=300, help="seconds to wait for the other hosts")
    args, success = parser.parse_args(), True
    with contextlib.ExitStack() as args.joined:
        for passed, line in examine(args):
            print(line, flush=True)
            success &= passed
    return 0 if success else 1


if __name__ == "__main__":
    sys.exit(main())
