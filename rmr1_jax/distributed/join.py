"""Several processes, one to a host: how a run finds its others, and the little they tell each other.

Every process runs the same program over the same mesh of all devices. Each reads and assembles what its own devices
need; the first alone writes. In one process every function here is there too and does nothing.
Next: `mesh.py`, which orders the devices of all processes.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

import jax

from rmr1_jax.distributed.exchange import _store, first
from rmr1_jax.distributed.heartbeat import Pulse
from rmr1_jax.errors import InputError, RunError

GO, NO = "go.", "no:"  # the first process's answers


EXPLICIT = ("RMR1_COORDINATOR", "RMR1_PROCESSES", "RMR1_PROCESS")


class Place(NamedTuple):
    """Which process this is. coordinator: host:port of the first. devices: numbers of its own, None for all it sees."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


@contextmanager
def together() -> Iterator[None]:
    """Join the run's other processes as the environment says, for the time of a run; before any other use of JAX.

    On a TPU pod and under Slurm they find each other; elsewhere RMR1_COORDINATOR=host:port, RMR1_PROCESSES=n and
    RMR1_PROCESS=i say it. Without any of these, and with RMR1_PROCESSES=1, there is one process and nothing is started.

    A process that falls silent for RMR1_LOST_TIMEOUT seconds (default 60) is named by the others, which end with 42.

    Raises:
        InputError: what the environment says cannot be.
        RunError: not all processes are there within RMR1_START_TIMEOUT seconds (default 300); names those missing.
    """
    timeout = _positive(os.environ, "RMR1_START_TIMEOUT", 300)
    silence = _positive(os.environ, "RMR1_LOST_TIMEOUT", 60)
    pulse = None
    place = None if jax.distributed.is_initialized() else find_place(os.environ, timeout)
    if place and place.count > 1:
        roll_call(place.coordinator, place.count, place.index, timeout)
        jax.distributed.initialize(
            *place[:3],
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
        )
        pulse = Pulse(_store(), index=place.index, count=place.count, host=socket.gethostname(), timeout=silence)
        pulse.start()
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as e:
        if pulse and isinstance(e, jax.errors.JaxRuntimeError):
            pulse.others_may_be_lost()
        if jax.distributed.is_initialized():
            # JAX would wait for the others at the exit, and they may be waiting for this one in the middle of a step.
            code = exit_code(e)
            if pulse:
                pulse.end(code)
            atexit.register(_leave, code)
        raise
    if pulse:
        pulse.end(0)


def exit_code(error: BaseException) -> int:
    """What a process ends with that this ended: see `cli.py`."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def find_place(environ: Mapping[str, str], timeout: int) -> Place | None:
    """What the environment says; None where it speaks of no others.

    Raises:
        InputError: see `together`.
    """
    if any(name in environ for name in EXPLICIT):
        return _explicit_place(environ)
    # The public start in JAX asks these as well, and keeps what it learns to itself: who is missing could not be said.
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    cluster = None
    try:
        cluster = next((c for c in (SlurmCluster, GkeTpuCluster, GceTpuCluster) if c.is_env_present()), None)
        if cluster is None or (count := cluster.get_process_count()) == 1:
            return None
        port = environ.get("JAX_COORDINATOR_PORT")
        coordinator = cluster.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        # A TPU host is one process with all its chips; a Slurm task has the one GPU of its number on the node.
        local = cluster.get_local_process_id()
        return Place(coordinator, count, cluster.get_process_id(), None if local is None else [local])
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        raise InputError(
            f"cannot learn which processes this run has from {cluster.name if cluster else 'the TPU'}'s environment "
            f"({e}); set RMR1_PROCESSES=1 where this is the only one, else {', '.join(EXPLICIT)}"
        ) from e


def _explicit_place(environ: Mapping[str, str]) -> Place | None:
    count = _positive(environ, "RMR1_PROCESSES", None)
    if count == 1:
        return None
    missing = [name for name in EXPLICIT if name not in environ]
    if missing:
        raise InputError(f"{', '.join(missing)} must be set as well: {', '.join(EXPLICIT)} go together")
    coordinator, index = environ["RMR1_COORDINATOR"], environ["RMR1_PROCESS"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"RMR1_COORDINATOR={coordinator!r} must be host:port of the first process")
    if not index.isdigit() or int(index) >= count:
        raise InputError(f"RMR1_PROCESS={index!r} must be a number from 0 to {count - 1} (RMR1_PROCESSES={count})")
    return Place(coordinator, count, int(index))


def _positive(environ: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = environ.get(name, "")
    if text and (not text.isdigit() or int(text) < 1):
        raise InputError(f"{name}={text!r} must be a whole number of at least 1")
    return int(text) if text else default


def roll_call(coordinator: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes have called the first one. JAX does this too, but ends every process without a word
    about who was missing; its service starts on this port afterwards.

    Raises:
        RunError: on every process that is there, with the numbers of those that are not.
    """
    until = time.monotonic() + timeout
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        _call_the_roll(int(port), count, until, timeout)
        return
    answer = ""
    while answer[:3] not in (GO, NO):
        left = until - time.monotonic()
        if left <= 0:
            raise RunError(
                f"process 0, the coordinator at {coordinator}, was not there within {timeout:g} s, says process "
                f"{index} of {count} on {socket.gethostname()}; start it, or check the address and the firewall"
            )
        try:
            with socket.create_connection((host, int(port)), timeout=left) as connection:
                connection.sendall(f"{count} {index} {socket.gethostname()}\n".encode())
                connection.settimeout(timeout + 5)  # the first one may have begun to wait later than this one
                answer = connection.makefile(errors="replace").read()
        except OSError:
            pass  # not there yet
        time.sleep(0.1)
    if answer != GO:
        raise RunError(answer.removeprefix(NO))


def _call_the_roll(port: int, count: int, until: float, timeout: float) -> None:
    """The first process's side: who calls is told to go when all have called, or else what is wrong."""
    there = {0: socket.gethostname()}
    calls: dict[int, socket.socket] = {}
    problem = ""
    with closing(_listen(port, count)) as server:
        while len(there) < count and not problem:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                said = connection.makefile(errors="replace").readline(1000).split()
            except OSError:  # the time is over, or somebody called and hung up
                if time.monotonic() > until:
                    problem = _missing(there, count, timeout)
                continue
            if len(said) != 3 or not said[1].isdigit():
                connection.close()  # a stranger
                continue
            for gone in [i for i, call in calls.items() if _hung_up(call)]:  # it may be started again
                del there[gone], calls[gone]
            index, name = int(said[1]), said[2]
            if said[0] != str(count):
                problem = f"process {index} on {name} was told of {said[0]} processes, process 0 of {count}"
            elif index in there:
                problem = f"process {index} is there twice, on {there[index]} and on {name}"
                index = -1  # tell both
            there[index], calls[index] = name, connection
    for connection in calls.values():
        with closing(connection), suppress(OSError):
            connection.sendall((NO + problem if problem else GO).encode())
    if problem:
        raise RunError(problem)


def _listen(port: int, count: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=both)
    except OSError as e:
        raise InputError(f"process 0 cannot listen on port {port} ({e.strerror}); is another run using it?") from e


def _missing(there: Mapping[int, str], count: int, timeout: float) -> str:
    missing = [str(i) for i in range(count) if i not in there]
    named = f"process{'es' if len(missing) > 1 else ''} {', '.join(missing)} of {count}"
    present = ", ".join(f"{i} on {name}" for i, name in sorted(there.items()))
    return f"{named} did not appear within {timeout:g} s (present: {present}); start every process, on every host"


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end of a connection that says nothing more is gone."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _leave(code: int) -> None:
    """Exit without waiting for anybody. With the first process JAX's service ends, and with it all the others: what
    failed for all of them alike they should have the time to say."""
    sys.stdout.flush()
    sys.stderr.flush()
    if first():
        time.sleep(3)
    os._exit(code)
