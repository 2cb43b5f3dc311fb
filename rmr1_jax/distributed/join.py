"""Start-up of a run of several processes, usually one on each host.

Every process runs the same program over the same mesh of all devices. Each reads and assembles what its own devices
need; process 0 alone writes files. `join_processes` learns from the environment which process this is, checks that all
processes are present, starts `jax.distributed`, and watches the other processes with `heartbeat.py`.
Next: `mesh.py`, which orders the devices of all processes.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait as wait_for
from typing import NamedTuple

import jax

from rmr1_jax.distributed.exchange import first
from rmr1_jax.distributed.heartbeat import Heartbeat
from rmr1_jax.errors import InputError, RunError, exit_code
from rmr1_jax.jax_private import cluster_classes, coordination_client

VARIABLES = ("RMR1_COORDINATOR", "RMR1_PROCESSES", "RMR1_PROCESS")

OK, FAILED = "ok.", "no:"  # how an answer of process 0 to the attendance check begins


class ProcessInfo(NamedTuple):
    """Which process this is. coordinator: host:port of process 0. count: the number of processes. devices: the local
    device ids of this process; None for all that it sees."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


@contextmanager
def join_processes() -> Iterator[None]:
    """Join the other processes of the run for the time of the `with` block. Enter it before any other use of JAX.

    The processes of a TPU pod or of a Slurm job find each other. Elsewhere set RMR1_COORDINATOR=host:port,
    RMR1_PROCESSES=n and RMR1_PROCESS=i in each. Without any of these, or with RMR1_PROCESSES=1, the run has one
    process and nothing is started. When a process is silent for RMR1_LOST_TIMEOUT seconds (default 60), the others
    print its number and host and exit with 42.

    Raises:
        InputError: the environment variables are incomplete or wrong.
        RunError: not all processes have started within RMR1_START_TIMEOUT seconds (default 300); names the missing.
    """
    timeout = _positive(os.environ, "RMR1_START_TIMEOUT", 300)
    silence = _positive(os.environ, "RMR1_LOST_TIMEOUT", 60)
    heartbeat = None
    info = None if jax.distributed.is_initialized() else process_info(os.environ, timeout)
    if info and info.count > 1:
        check_attendance(info.coordinator, info.count, info.index, timeout)
        options = {"cluster_detection_method": "deactivate", "initialization_timeout": timeout}
        jax.distributed.initialize(*info[:3], local_device_ids=info.devices, **options)
        client, host = coordination_client(), socket.gethostname()
        heartbeat = Heartbeat(client, index=info.index, count=info.count, host=host, timeout=silence)
        heartbeat.start()
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as e:
        if heartbeat and isinstance(e, jax.errors.JaxRuntimeError):
            heartbeat.wait_for_lost_process()
        if jax.distributed.is_initialized():
            # At its exit JAX waits for the other processes, which may be waiting for this one in a collective.
            if heartbeat:
                heartbeat.end(exit_code(e))
            atexit.register(_exit_at_once, exit_code(e))
        raise
    if heartbeat:
        heartbeat.end(0)


def process_info(environ: Mapping[str, str], timeout: int) -> ProcessInfo | None:
    """Read from the environment which process this is; None for a run of one process. Raises as `join_processes`."""
    if any(name in environ for name in VARIABLES):
        return _from_variables(environ)
    # `jax.distributed.initialize` detects these clusters too, but does not report what it found, and without the number
    # of processes nobody could say which are missing.
    cluster = None
    try:
        cluster = next((c for c in cluster_classes() if c.is_env_present()), None)
        if cluster is None or (count := cluster.get_process_count()) == 1:
            return None
        port = environ.get("JAX_COORDINATOR_PORT")
        coordinator = cluster.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        local = cluster.get_local_process_id()  # None on a TPU host, which runs one process with all its chips
        devices = None if local is None else _slurm_devices(environ, local)
        return ProcessInfo(coordinator, count, cluster.get_process_id(), devices)
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        raise InputError(
            f"cannot read the processes of this run from the environment of {cluster.name if cluster else 'the TPU'} "
            f"({e}); set RMR1_PROCESSES=1 if this is the only process, else {', '.join(VARIABLES)}"
        ) from e


def _slurm_devices(environ: Mapping[str, str], local: int) -> list[int] | None:
    """Return the local device ids of a Slurm task; None for all that it sees.

    The only task of a node has all its devices. Of several, each has the device with its number on the node, unless
    Slurm shows each task no more than its own (`--gpus-per-task`).
    """
    counts: list[int] = []  # tasks on each node, from a text such as "4(x2),3"
    for text in environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        if words := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text.strip()):
            counts += [int(words[1])] * int(words[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    tasks = counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    bound = bool(visible and tasks) and len(visible.split(",")) < tasks
    return None if tasks == 1 or bound else [local]


def _from_variables(environ: Mapping[str, str]) -> ProcessInfo | None:
    count = _positive(environ, "RMR1_PROCESSES", None)
    if count == 1:
        return None
    if missing := [name for name in VARIABLES if name not in environ]:
        raise InputError(f"{', '.join(missing)} must be set as well: {', '.join(VARIABLES)} go together")
    coordinator, index = environ["RMR1_COORDINATOR"], environ["RMR1_PROCESS"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"RMR1_COORDINATOR={coordinator!r} must be host:port of process 0")
    if not index.isdigit() or int(index) >= count:
        raise InputError(f"RMR1_PROCESS={index!r} must be a number from 0 to {count - 1} (RMR1_PROCESSES={count})")
    return ProcessInfo(coordinator, count, int(index))


def _positive(environ: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = environ.get(name, "")
    if text and (not text.isdigit() or int(text) < 1):
        raise InputError(f"{name}={text!r} must be a whole number of at least 1")
    return int(text) if text else default


def check_attendance(coordinator: str, count: int, index: int, timeout: float) -> None:
    """Wait until all processes have reported to process 0, on the port that JAX's service takes afterwards.

    JAX waits for the processes too, but then aborts every process with DEADLINE_EXCEEDED and names none of the missing.

    Raises:
        RunError: in every process that is present, with the numbers of those that are missing after `timeout` seconds.
        InputError: process 0 cannot listen on the port.
    """
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        _collect_attendance(int(port), count, timeout)
        return
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        # An OSError means that process 0 does not listen yet.
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=left) as connection:
            connection.sendall(f"{count} {index} {socket.gethostname()}\n".encode())
            connection.settimeout(timeout + 5)  # the deadline of process 0 may be later than this one's
            answer = connection.makefile(errors="replace").read()
            if answer == OK:
                return
            if answer.startswith(FAILED):
                raise RunError(answer.removeprefix(FAILED))
        time.sleep(0.1)
    raise RunError(
        f"process 0, the coordinator at {coordinator}, did not appear within {timeout:g} s, reports process {index} of "
        f"{count} on {socket.gethostname()}; start it, or check the address and the firewall"
    )


def _collect_attendance(port: int, count: int, timeout: float) -> None:
    """Do the part of process 0: answer all processes when they have reported, or at the first contradiction."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual)
    except OSError as e:
        raise InputError(f"process 0 cannot listen on port {port} ({e.strerror}); is another run using it?") from e
    present = {server: (0, socket.gethostname())}  # the connection of each process -> its number and host
    problem, deadline = "", time.monotonic() + timeout
    with server:
        while len(present) < count and not problem:
            ready = wait_for(list(present), max(0.0, deadline - time.monotonic()))
            for closed in set(ready) - {server}:  # a process sends nothing more; one that has ended may be restarted
                del present[closed]
            hosts = dict(present.values())
            if not ready:
                missing = [str(i) for i in range(count) if i not in hosts]
                problem = (
                    f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {count} did not appear within "
                    f"{timeout:g} s (present: {', '.join(f'{i} on {host}' for i, host in sorted(hosts.items()))}); "
                    "start every process, on every host"
                )
            elif server in ready and (report := _read_report(server)):
                connection, theirs, index, host = report
                present[connection] = index, host
                if theirs != count:
                    problem = f"process {index} on {host} expects {theirs} processes, process 0 expects {count}"
                elif index in hosts:
                    problem = f"process {index} was started twice, on {hosts[index]} and on {host}"
    del present[server]
    for connection in present:
        with connection, suppress(OSError):
            connection.sendall((FAILED + problem if problem else OK).encode())
    if problem:
        raise RunError(problem)


def _read_report(server: socket.socket) -> tuple[socket.socket, int, int, str] | None:
    """Accept a connection and read its process's count, number and host; None for any other program."""
    with suppress(OSError):
        connection, _ = server.accept()
        connection.settimeout(5)
        if words := re.fullmatch(r"(\d+) (\d+) (\S+)\n", connection.makefile(errors="replace").readline(1000)):
            return connection, int(words[1]), int(words[2]), words[3]
    return None


def _exit_at_once(code: int) -> None:
    """Exit without waiting for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    if first():
        time.sleep(3)  # JAX ends the others with process 0; they need the time to print an error that all have met
    os._exit(code)
