"""What UCX does without us: its own ``ucx_perftest`` between two processes."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Literal

from polarkv_sglang.bench.ucx_tools import find_tool, tool_environment
from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.library import Library

MAX_WINDOW = 32  # operations under way at once, at most: more measured no faster

_LISTEN_DEADLINE_S = 10.0
_RUN_DEADLINE_S = 120.0
_TESTS = {"put": "ucp_put_bw", "get": "ucp_get"}
_BYTES_A_RUN = {"tcp": 128 << 20}
_BYTES_A_RUN_DEFAULT = 512 << 20
_MIB = 1 << 20


class PerfTest:
    """Raw UCX between two processes over loopback, as the upper end of what a transport can give."""

    def __init__(self, library: Library, ucx_tls: str | None) -> None:
        """TransportError if there is no ``ucx_perftest``."""
        tool = find_tool(library, "ucx_perftest")
        if tool is None:
            raise TransportError(
                "there is no ucx_perftest; the libucx-cu13 wheel and Debian's ucx-utils have it"
            )
        self._tool = tool
        self._environ = tool_environment(library, ucx_tls)
        self._bytes = _BYTES_A_RUN.get(ucx_tls or "", _BYTES_A_RUN_DEFAULT)

    def gbps(self, op: Literal["put", "get"], length: int, window: int) -> float:
        """GB/s of puts or gets of ``length`` bytes, ``window`` of them under way at once.

        It moves one buffer over and over, which stays in the processor's caches where it fits them: up to
        some MiB this is more than memory could give. TransportError if it does not come to a figure.
        """
        port = _free_port()
        server = subprocess.Popen(
            [self._tool, "-p", str(port)],
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_until_listening(server, port)
            iterations = max(4, min(4000, self._bytes // length))
            command = [self._tool, "127.0.0.1", "-p", str(port), "-t", _TESTS[op], "-s", str(length)]
            command += ["-n", str(iterations), "-w", str(iterations // 10 + 1), "-O", str(window), "-f"]
            done = subprocess.run(
                command,
                env=self._environ,
                capture_output=True,
                text=True,
                timeout=_RUN_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TransportError(
                f"ucx_perftest {_TESTS[op]} of {length} bytes took over {_RUN_DEADLINE_S:g} s"
            ) from error
        except OSError as error:
            raise TransportError(f"{self._tool} cannot be started: {error.strerror}") from error
        finally:
            server.kill()
            server.wait()
        return _parse(done)


def _parse(done: subprocess.CompletedProcess[str]) -> float:
    """The last line is: iterations, three overheads, average and overall MiB/s, average and overall rates."""
    columns = (done.stdout.strip().splitlines() or [""])[-1].split()
    try:
        return float(columns[5]) * _MIB / 1e9
    except (IndexError, ValueError) as error:
        last_words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TransportError(f"ucx_perftest gave no figure: {last_words}") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_until_listening(server: subprocess.Popen[bytes], port: int) -> None:
    """It says nothing when it is ready, and a connection to see would be the only one that it takes."""
    wanted = f":{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + _LISTEN_DEADLINE_S
    while wanted not in Path("/proc/net/tcp").read_text(encoding="ascii"):
        if server.poll() is not None:
            raise TransportError(f"the server of ucx_perftest ended with {server.returncode}")
        if time.monotonic() > deadline:
            raise TransportError(f"ucx_perftest does not listen after {_LISTEN_DEADLINE_S:g} s")
        time.sleep(0.01)
