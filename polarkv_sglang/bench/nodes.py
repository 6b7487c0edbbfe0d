"""Memory nodes in processes of their own, for as long as something is measured on them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from polarkv_sglang.config import ENV_PREFIX
from polarkv_sglang.errors import NodeError

START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 10.0
_SETTLE_S = 0.25  # at 0.1 GB/s, which is slow, that would be 25 MB
_READY = re.compile(r"polarkv node \w+ listening on (?P<address>\S+), ")


@dataclass(frozen=True)
class LocalNode:
    """A memory node that was started here and is reached over loopback."""

    address: str  # host:port
    token: str
    pid: int

    def wait_settled(self) -> None:
        """Wait until it takes no more memory from the system: it backs its slab in the background."""
        process = psutil.Process(self.pid)
        resident, before = process.memory_info().rss, -1
        while resident > before:
            time.sleep(_SETTLE_S)
            before, resident = resident, process.memory_info().rss


@contextlib.contextmanager
def local_node(
    capacity_bytes: int,
    *flags: str,
    token: str | None = None,
    ucx_tls: str | None = None,
    ucx_library: str | None = None,
) -> Iterator[LocalNode]:
    """The real ``polarkv node``, ended with the block; by default with a token of its own.

    ``flags`` are further ones of that command. Raises NodeError with the node's last words if it does not
    start.
    """
    command = [sys.executable, "-m", "polarkv_sglang.cli", "node", "--log-level", "warning"]
    command += ["--listen", "127.0.0.1:0", "--capacity", str(capacity_bytes), *flags]
    command += ["--ucx-tls", ucx_tls] if ucx_tls is not None else []
    command += ["--ucx-library", ucx_library] if ucx_library is not None else []
    token = token or secrets.token_hex(16)
    # What is configured for the pool is not for this node: it would answer us over TLS, for example.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    environ |= {"POLARKV_TOKEN": token}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            ready = _READY.match(_first_line(process))
            if ready is None:
                log.seek(0)
                last_words = (log.read().strip().splitlines() or ["it says nothing"])[-1]
                raise NodeError(f"a memory node could not be started here: {last_words}")
            yield LocalNode(ready["address"], token, process.pid)
        finally:
            _end(process)


def _first_line(process: subprocess.Popen[str]) -> str:
    """What the node says once it is ready; empty if it ended or says nothing for START_DEADLINE_S."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
    return process.stdout.readline() if readable else ""


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
