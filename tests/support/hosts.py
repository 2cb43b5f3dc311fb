"""Starts the processes of a run on this machine, with virtual devices."""

import os
import socket
import subprocess


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command: list[str], index: int, count: int, port: int, devices: int = 4, **environ: str) -> subprocess.Popen:
    """Start one process of `count`. environ: more environment variables."""
    place = {"RMR1_COORDINATOR": f"127.0.0.1:{port}", "RMR1_PROCESSES": str(count), "RMR1_PROCESS": str(index)}
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environ = os.environ | {"XLA_FLAGS": flags} | place | environ
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
