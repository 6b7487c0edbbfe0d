"""Helpers that start the real product for tests."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import NodeStatistics, Role, Statistics

START_S = 30.0
STOP_S = 15.0
_READY = re.compile(
    r"polarkv node (?P<id>\w+) listening on (?P<address>\S+), .*?(metrics on (?P<metrics>\S+))?$"
)


def freeze(pid: int) -> None:
    """SIGSTOP; returns once every thread of the process has stopped: the signal only asks for it."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in tasks.glob("*/stat")):
        time.sleep(0.001)


@dataclass(frozen=True)
class RunningNode:
    """A memory node in a process of its own."""

    address: str  # host:port
    process: subprocess.Popen[str]
    ready_line: str
    metrics_url: str | None
    token: str | None

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self, role: Role = "rank", deadline_s: float = 5.0) -> ControlConnection:
        return ControlConnection.connect(
            self.address, token=self.token, role=role, client="test", deadline_s=deadline_s
        )

    def statistics(self) -> NodeStatistics:
        with self.connect("observer") as connection:
            return connection.request(Statistics(connection.next_id()), 5.0)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def freeze(self) -> None:
        """It answers nobody until SIGCONT."""
        freeze(self.pid)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; a stopped process too."""
        self.process.kill()
        self.process.wait(STOP_S)


@contextlib.contextmanager
def running_node(
    capacity: str = "64MiB",
    *flags: str,
    token: str | None = None,
    listen: str = "127.0.0.1:0",
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[RunningNode]:
    """The real ``polarkv node``; killed at the end if it still runs.

    ``launcher`` is a command that starts it in its own place (it must exec). Its stderr is appended to
    ``log``, or goes to the test's.
    """
    environ = {**os.environ, **(environment or {})}
    environ.pop("POLARKV_TOKEN", None)
    if token is not None:
        environ["POLARKV_TOKEN"] = token
    command = [*launcher, sys.executable, "-m", "polarkv_sglang.cli"]
    command += ["node", "--listen", listen, "--capacity", capacity, *flags]
    with (
        contextlib.nullcontext() if log is None else log.open("a") as stderr,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        # Ends the blocking readline below if the node hangs.
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            watchdog.cancel()
            ready = _READY.match(line)
            assert ready is not None, (
                f"polarkv node ended with {process.wait(STOP_S)} instead of a ready line"
            )
            yield RunningNode(ready["address"], process, line, ready["metrics"], token)
        finally:
            watchdog.cancel()
            process.kill()


@contextlib.contextmanager
def running_nodes(count: int, *arguments: str) -> Iterator[list[RunningNode]]:
    """Several that are like running_node(*arguments) and start at once."""
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(count) as threads:
        nodes = [running_node(*arguments) for _ in range(count)]
        yield list(threads.map(stack.enter_context, nodes))


def free_port() -> int:
    """A port for a server that starts later, or again: below those that the kernel gives to others."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
