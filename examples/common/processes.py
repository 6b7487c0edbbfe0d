"""Starting and ending servers, and the command lines that start them."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from polarkv_sglang.errors import PolarError

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0
PROGRESS_EVERY_S = 10.0

_started_at = time.monotonic()


def say(text: str) -> None:
    """Print a line with the time since the program began."""
    print(f"[{time.monotonic() - _started_at:6.1f} s] {text}", flush=True)


def unwind_on_signals() -> None:
    """What ends this program from outside (SIGTERM, SIGHUP) also ends the servers that it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


class ProcessFailed(PolarError):
    """A process ended or did not become ready; the text holds the end of its log."""


class Process:
    """A child in a process group of its own, which goes as a whole when the child is stopped."""

    def __init__(
        self,
        name: str,
        command: list[str],
        is_ready: Callable[[], bool],
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """``environment`` is added to this process's own."""
        self.name = name
        self._start_timeout_s = start_timeout_s
        self._environment = environment or {}
        self._command = command
        self._is_ready = is_ready
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None

    def command_line(self) -> str:
        """As one would type it in the current folder."""
        program = Path(self._command[0])
        shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
        variables = [f"{name}={shlex.quote(value)}" for name, value in self._environment.items()]
        return " ".join([*variables, shlex.join([str(shown), *self._command[1:]])])

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self._environment},
            )

    def wait_until_ready(self) -> None:
        """Raises ProcessFailed if the child ends, or is not ready within start_timeout_s."""
        started = time.monotonic()
        next_progress = PROGRESS_EVERY_S
        while not self._is_ready():
            waited = time.monotonic() - started
            self.check()
            if waited > self._start_timeout_s:
                raise ProcessFailed(
                    f"{self.name} was not ready after {self._start_timeout_s:.0f} s\n{self.tail()}"
                )
            if waited > next_progress:
                next_progress += PROGRESS_EVERY_S
                say(f"  waiting for {self.name} (log: {self._log})")
            time.sleep(0.25)

    def check(self) -> None:
        """Raises ProcessFailed if the child has ended."""
        if self._child is not None and self._child.poll() is not None:
            raise ProcessFailed(f"{self.name} ended with status {self._child.returncode}\n{self.tail()}")

    def stop(self) -> None:
        """SIGTERM and wait; then SIGKILL to what is left of its group. Does nothing if nothing runs."""
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say(f"{self.name} ignores SIGTERM; killing it")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def kill(self) -> None:
        """SIGKILL to its whole group, as a crash would end it; returns when all of it is gone."""
        child, self._child = self._child, None
        if child is None:
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(child.pid, 0)
                time.sleep(0.02)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        text = self._log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- end of {self._log}", *text])


def free_ports(count: int) -> list[int]:
    """Free TCP ports below the range that outgoing connections take theirs from."""
    ports: list[int] = []
    for port in range(31000, 32768):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ProcessFailed(f"fewer than {count} free TCP ports in 31000-32767")


def engine(
    name: str,
    model: Path | str,
    port: int,
    flags: list[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Process:
    """An SGLang server; ready when it says so: after its own first request, unless that is skipped."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    return Process(name, command, lambda: _is_healthy(port), log, environment, start_timeout_s)


def memory_node(port: int, capacity: str, log: Path) -> Process:
    """A node of the pool; ready when its control port accepts connections."""
    program = Path(sys.executable).with_name("polarkv")
    command = [str(program), "node", "--listen", f"127.0.0.1:{port}", "--capacity", capacity]
    return Process("memory node", command, lambda: accepts(port), log)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def accepts(port: int) -> bool:
    """Whether something listens on the port of this host."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
