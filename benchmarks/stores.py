"""The stores under comparison, each behind the same three calls; their servers are processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.blocks import Blocks
from examples.common.processes import STOP_TIMEOUT_S, Process, accepts, free_ports
from polarkv_sglang import __version__
from polarkv_sglang.errors import PolarError
from polarkv_sglang.pool.blocks import Chain, Pieces, chain
from polarkv_sglang.pool.client import PoolClient

DEADLINE_S = 10.0  # no batch of the comparison may be cut short
_LINK_S = 20.0
_CLIENT = Path(__file__).with_name("mooncake_client.py")


class ComparisonFailed(PolarError):
    """A store did not start, refused a call, or gave back other bytes than were put."""


class Store(Protocol):
    """A store and its one client. Blocks lie one after the other at the head of each half of ``Blocks``."""

    name: str
    version: str

    def put(self, keys: Sequence[bytes], block_bytes: int) -> float:
        """Write blocks of the source; returns the seconds that the client's call took."""
        ...

    def get(self, keys: Sequence[bytes], block_bytes: int) -> float:
        """Read blocks into the target; returns the seconds that the client's call took."""
        ...

    def discard(self, keys: Sequence[bytes]) -> None:
        """Say that the blocks are not needed any more."""
        ...


class PolarStore:
    """A memory node's client, in this process."""

    def __init__(self, name: str, client: PoolClient, blocks: Blocks) -> None:
        self.name = name
        library = client.library
        self.version = f"PolarKV {__version__}, libucp {'.'.join(map(str, library.version))}"
        self._client = client
        self._source = blocks.address
        self._target = blocks.address + blocks.half_bytes

    def put(self, keys: Sequence[bytes], block_bytes: int) -> float:
        return self._timed(self._client.put, keys, self._source, block_bytes)

    def get(self, keys: Sequence[bytes], block_bytes: int) -> float:
        return self._timed(self._client.get, keys, self._target, block_bytes)

    def discard(self, keys: Sequence[bytes]) -> None:
        """Nothing: the node evicts blocks when it needs room, within a later put."""

    def _timed(
        self,
        transfer: Callable[[Chain, Pieces], npt.NDArray[np.bool_]],
        keys: Sequence[bytes],
        address: int,
        block_bytes: int,
    ) -> float:
        prefix = chain([], keys, len(keys))
        addresses = address + np.arange(len(keys), dtype=np.uint64) * np.uint64(block_bytes)
        pieces = Pieces(addresses[:, None], block_bytes)
        started = time.perf_counter()
        done = transfer(prefix, pieces)
        seconds = time.perf_counter() - started
        if not done.all():
            raise ComparisonFailed(
                f"{self.name}: {transfer.__name__} of {len(keys)} x {block_bytes} B did {done.sum()} blocks: "
                f"{self._client.statistics()}, {self._client.membership.reasons()}"
            )
        return seconds


class MooncakeStore:
    """A client of a Mooncake store, in a process of Mooncake's interpreter."""

    def __init__(self, name: str, commands: IO[str], answers: IO[str], blocks: Blocks, log: Path) -> None:
        self.name = name
        self._commands, self._answers, self._log = commands, answers, log
        self._half_bytes = blocks.half_bytes
        self.version = str(self._read()["version"])

    def put(self, keys: Sequence[bytes], block_bytes: int) -> float:
        return self._timed("put", keys, 0, block_bytes)

    def get(self, keys: Sequence[bytes], block_bytes: int) -> float:
        return self._timed("get", keys, self._half_bytes, block_bytes)

    def discard(self, keys: Sequence[bytes]) -> None:
        self._ask({"do": "remove", "keys": [key.hex() for key in keys]})

    def _timed(self, what: str, keys: Sequence[bytes], offset: int, block_bytes: int) -> float:
        names = [key.hex() for key in keys]
        answer = self._ask({"do": what, "keys": names, "offset": offset, "block_bytes": block_bytes})
        return float(str(answer["seconds"]))

    def _ask(self, command: dict[str, object]) -> dict[str, object]:
        with suppress(BrokenPipeError):  # its last words are still to be read
            print(json.dumps(command), file=self._commands, flush=True)
        return self._read()

    def _read(self) -> dict[str, object]:
        line = self._answers.readline()
        answer: dict[str, object] = json.loads(line) if line else {"error": "its client ended"}
        if "error" in answer:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise ComparisonFailed(f"{self.name}: {answer['error']}\n--- end of {self._log}\n{end}")
        return answer


@contextmanager
def polar_store(
    name: str, blocks: Blocks, capacity_bytes: int, tls: str | None, log: Path
) -> Iterator[PolarStore]:
    """A memory node and a client of it, over ``tls`` (None: what they choose by themselves)."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "polarkv_sglang.cli", "node", "--listen", f"127.0.0.1:{port}"]
    command += ["--capacity", str(capacity_bytes), "--segment", "64MiB"]
    command += [] if tls is None else ["--ucx-tls", tls]
    with _running(Process(f"{name}: memory node", command, lambda: accepts(port), log)):
        client = PoolClient(
            [f"127.0.0.1:{port}"],
            token=os.environ.get("POLARKV_TOKEN"),
            deadline_s=DEADLINE_S,
            client="comparison",
            ucx_tls=tls,
        )
        try:
            client.register(blocks.address, blocks.length)
            client.membership.wait_tried(_LINK_S)
            if not client.membership.live:
                raise ComparisonFailed(f"{name}: {client.membership.reasons()}")
            yield PolarStore(name, client, blocks)
        finally:
            client.close()


@contextmanager
def mooncake_store(
    name: str, python: Path, blocks: Blocks, capacity_bytes: int, logs: Path
) -> Iterator[MooncakeStore]:
    """A Mooncake master, a process that lends a segment, and a client that lends none, over tcp."""
    master_port, metrics_port, owner_port = free_ports(3)
    master = [str(python.with_name("mooncake_master")), "--rpc_address=127.0.0.1"]
    master += [f"--rpc_port={master_port}", "--metrics_host=127.0.0.1", f"--metrics_port={metrics_port}"]
    owner = [str(python.with_name("mooncake_client")), "--host=127.0.0.1", f"--port={owner_port}"]
    owner += [f"--master_server_address=127.0.0.1:{master_port}", "--metadata_server=P2PHANDSHAKE"]
    owner += ["--protocol=tcp", f"--global_segment_size={capacity_bytes >> 20}MB"]
    client = [str(python), str(_CLIENT), f"--master=127.0.0.1:{master_port}"]
    client += [f"--descriptor={blocks.descriptor}", f"--length={blocks.length}"]
    log = logs / "mooncake_client.log"
    with ExitStack() as stack:
        for program, command, port in (("master", master, master_port), ("owner", owner, owner_port)):
            process = Process(
                f"{name}: {program}", command, _listens_on(port), logs / f"mooncake_{program}.log"
            )
            stack.enter_context(_running(process))
        child = stack.enter_context(_child(client, blocks, log))
        assert child.stdin is not None
        assert child.stdout is not None
        yield MooncakeStore(name, child.stdin, child.stdout, blocks, log)


@contextmanager
def _running(process: Process) -> Iterator[None]:
    process.start()
    try:
        process.wait_until_ready()
        yield
    finally:
        process.stop()


@contextmanager
def _child(command: list[str], blocks: Blocks, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that inherits the shared memory, and ends when its stdin does."""
    with log.open("wb") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            pass_fds=[blocks.descriptor],
        )
    with child:
        try:
            yield child
            child.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            child.kill()


def _listens_on(port: int) -> Callable[[], bool]:
    return lambda: accepts(port)
