"""Helpers that start the real product for tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import NodeStatistics, Role, Statistics

START_S = 30.0
STOP_S = 15.0
_READY = re.compile(
    r"polarkv node (?P<id>\w+) listening on (?P<address>\S+), .*?(metrics on (?P<metrics>\S+))?$"
)


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
) -> Iterator[RunningNode]:
    """The real ``polarkv node``; killed at the end if it still runs. Its stderr goes to the test's."""
    environ = {**os.environ, **(environment or {})}
    environ.pop("POLARKV_TOKEN", None)
    if token is not None:
        environ["POLARKV_TOKEN"] = token
    command = [sys.executable, "-m", "polarkv_sglang.cli", "node", "--listen", listen, "--capacity", capacity]
    with subprocess.Popen([*command, *flags], env=environ, stdout=subprocess.PIPE, text=True) as process:
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
