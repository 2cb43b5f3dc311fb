#!/usr/bin/env python3
"""Is this machine, or every host of this slice, ready to train? One line a check; exit code 0 if all are well, else 1.

    python tpu/doctor.py --out gs://BUCKET/runs                          a TPU host; on a slice, on all hosts at once
    python tpu/doctor.py --out DIR --platform cpu                        a laptop
    python tpu/doctor.py --out DIR --chips 16 --hosts 4                  and it must be that slice

Checked are versions, that JAX found the platform that is expected and did not fall back to the CPU, the number of
devices and hosts, that the output directory (or bucket) can be written, read and cleaned, and a sum over all devices of
all hosts, with the seconds that each took. On several hosts it waits `--timeout` seconds for the others.
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
# The oldest that the code is written for; the newest that Python 3.11 can have are jax 0.10.2 and flax 0.12.8.
PACKAGES = {"jax": (0, 10), "jaxlib": (0, 10), "flax": (0, 12), "optax": (0, 2, 5), "orbax-checkpoint": (0, 12)}
LIBTPU = (0, 0, 42)  # 0.0.21 crashes with this jax


class Unwell(Exception):
    """A check that failed: what was found, and what to do."""


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
        raise Unwell(f"{'; '.join(wrong)}: pip install -U -e '.{f'[{extra}]' if extra else ''}'")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version}" for name, version in found.items())])


def start_up(args: argparse.Namespace) -> str:
    """Joins the other hosts as a run does (`rmr1_jax/processes.py`), before anything asks for devices."""
    import jax

    from rmr1_jax.distributed.join import join_processes

    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("RMR1_START_TIMEOUT", str(args.timeout))
    args.joined.enter_context(join_processes())
    if not jax.distributed.is_initialized():
        return "one process; the environment speaks of no others"
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def platform(args: argparse.Namespace) -> str:
    import jax

    found = jax.default_backend()
    if found != args.platform:
        held = "; is another process holding the chips, and is libtpu installed?" if args.platform == "tpu" else ""
        raise Unwell(f"JAX runs on {found}, expected {args.platform}{held}")
    return f"{found}, {jax.devices()[0].device_kind}"


def devices(args: argparse.Namespace) -> str:
    import jax

    said = (
        f"{jax.device_count()} in {jax.process_count()} processes, {jax.local_device_count()} of them here; "
        f"this is process {jax.process_index()}"
    )
    for name, wanted, found in (
        ("chips", args.chips, jax.device_count()),
        ("hosts", args.hosts, jax.process_count()),
    ):
        if wanted is not None and wanted != found:
            raise Unwell(f"{said}; expected {wanted} {name}. Was it started on every host, and is the slice whole?")
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        # libtpu finds the chips of the slice by itself: all looks well, until the first checkpoint.
        raise Unwell(f"{said}; but they did not find each other: set RMR1_COORDINATOR, RMR1_PROCESSES, RMR1_PROCESS")
    return said


def output(args: argparse.Namespace) -> str:
    """A file of this process's own, written, read and deleted: on a mount every host must be able to."""
    from etils import epath

    path = epath.Path(args.out) / f".doctor-{uuid.uuid4().hex}"
    told = os.urandom(1 << 20)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(told)
        same = path.read_bytes() == told
        path.unlink()
    except Exception as e:  # a bucket's client raises errors of its own, by the kind of bucket
        raise Unwell(f"{args.out}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    if not same:
        raise Unwell(f"{args.out}: what was read is not what was written")
    return f"{args.out}: 1 MiB written, read and deleted"


def all_hosts_sum(args: argparse.Namespace) -> str:
    """Every device adds its number; a device or a link that is not there makes the sum wrong, or it never comes."""
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
        raise Unwell(f"the sum of 1 to {count} came out as {first}, then as {again}")
    return f"{first:g} over {count} devices; {1000 * (time.perf_counter() - began):.1f} ms when compiled"


CHECKS = (versions, start_up, platform, devices, output, all_hosts_sum)


def examine(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """(well, line) of each check in turn. What a broken environment raises is a finding like any other."""
    for check in CHECKS:
        began = time.perf_counter()
        try:
            well, said = True, check(args)
        except Unwell as e:
            well, said = False, str(e)
        except Exception as e:
            well, said = False, f"{type(e).__name__}: {' '.join(str(e).split())}"
        seconds = time.perf_counter() - began
        yield well, f"{'ok  ' if well else 'FAIL'} {check.__name__.replace('_', ' '):13} {seconds:6.1f} s  {said}"
        if check is start_up and not well:
            return  # without its hosts, a slice answers nothing more


def _numbers(version: str) -> tuple[int, ...]:
    """`0.10.2rc1` -> (0, 10, 2)."""
    numbers = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory or gs:// bucket that runs are to be written to")
    parser.add_argument("--platform", choices=("tpu", "gpu", "cpu"), default="tpu", help="what JAX must run on")
    parser.add_argument("--chips", type=int, help="devices that there must be, over all hosts")
    parser.add_argument("--hosts", type=int, help="processes that there must be")
    parser.add_argument("--timeout", type=int, default=300, help="seconds to wait for the other hosts")
    args, well = parser.parse_args(), True
    with contextlib.ExitStack() as args.joined:
        for fine, line in examine(args):
            print(line, flush=True)
            well &= fine
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
