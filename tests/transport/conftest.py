"""Real peers in processes of their own, and a client with registered memory to reach them from."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from polarkv_sglang.transport import (
    Context,
    Direction,
    Mapped,
    RemoteKey,
    Route,
    SharedHandle,
    Transferred,
    Worker,
    attach,
    load_library,
)
from tests.support import freeze

MIB = 1 << 20


def checksum(data: bytes) -> int:
    """Of a block: the format, in plain Python."""
    digests = [xxhash.xxh3_64_intdigest(data[at : at + 4096]) for at in range(0, len(data), 4096)]
    return xxhash.xxh3_64_intdigest(b"".join(digest.to_bytes(8, "little") for digest in digests))


class Peer:
    """One process that serves `length` bytes; fresh, they hold aligned words that count up from 0."""

    def __init__(self, length: int, tls: str | None) -> None:
        self.length = length
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer.py")), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if tls is None else {"UCX_TLS": tls}),
        )
        ready = json.loads(self._answer())
        self.address = bytes.fromhex(ready["address"])
        self.rkey = bytes.fromhex(ready["rkey"])
        self.base = int(ready["base"])
        self.shared = msgspec.convert(ready["shared"], SharedHandle)

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()

    def push(self, client: Client) -> None:
        """Has it put its first bytes over the client's memory; it answers when that is done, or not."""
        address, rkey = client.worker.address.hex(), client.memory.packed_rkey().hex()
        self.process.stdin.write(f"push {address} {rkey} {client.memory.address} {client.memory.length}\n")
        self.process.stdin.flush()

    def pushed(self) -> int:
        """The answer to push(): a status."""
        return int(self._answer())

    def digest(self, offset: int, length: int) -> str:
        self.process.stdin.write(f"digest {offset} {length}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> dict[str, float]:
        """Ends it in good order; says how long its worker took to stop serving, in seconds."""
        self.process.stdin.close()
        return json.loads(self._answer())

    def kill(self) -> None:
        self.process.kill()

    def freeze(self) -> None:
        freeze(self.process.pid)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass
class Blocks:
    """What Worker.transfer is told about the blocks of a batch."""

    route: np.ndarray
    remote: np.ndarray
    local: np.ndarray
    piece_bytes: int

    def __getitem__(self, part: slice) -> Blocks:
        return Blocks(self.route[part], self.remote[part], self.local[part], self.piece_bytes)


class Client:
    """A worker and `length` bytes of registered local memory."""

    def __init__(self, length: int, tls: str | None) -> None:
        self.context = Context(load_library(), tls=tls)
        self.buffer = np.zeros(length, np.uint8)
        self.memory = self.context.register(self.buffer.ctypes.data, length)
        self.worker = Worker(self.context)
        self.mapped: list[Mapped] = []

    def connect(self, peer: Peer) -> RemoteKey:
        return self.worker.connect(peer.address).unpack(peer.rkey)

    def attach(self, peer: Peer) -> Mapped:
        mapped = attach(peer.shared, peer.base)
        assert mapped is not None
        self.mapped.append(mapped)
        return mapped

    def blocks(self, count: int, size: int, *peers: Peer) -> Blocks:
        """`count` blocks of one piece of `size` bytes that go round the peers, at offsets that walk through
        memory."""
        index = np.arange(count)
        offsets = index * size
        route = (index % len(peers)).astype(np.uint32)
        bases = np.array([peer.base for peer in peers], np.uint64)
        return Blocks(
            route,
            bases[route] + (offsets % peers[0].length).astype(np.uint64),
            (self.memory.address + offsets % self.memory.length).astype(np.uint64)[:, None],
            size,
        )

    def transfer(
        self,
        direction: Direction,
        blocks: Blocks,
        routes: Sequence[Route],
        deadline_s: float = 20.0,
        digests: npt.NDArray[np.uint64] | None = None,
    ) -> Transferred:
        return self.worker.transfer(
            direction,
            routes,
            blocks.route,
            blocks.remote,
            blocks.local,
            blocks.piece_bytes,
            [self.memory],
            deadline_s,
            digests=digests,
        )

    def close(self) -> None:
        self.context.close()
        for mapped in self.mapped:
            mapped.close()


@pytest.fixture(params=[None, "tcp"], ids=["default", "tcp"])
def tls(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.fixture(params=["default", "tcp", "mapped"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start_peer() -> Iterator[Callable[[int, str | None], Peer]]:
    peers: list[Peer] = []

    def start(length: int, tls: str | None) -> Peer:
        peers.append(Peer(length, tls))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@contextlib.contextmanager
def shared_peers() -> Iterator[Callable[[str | None], Peer]]:
    """A peer of 16 MiB for each `tls`."""
    peers: dict[str | None, Peer] = {}

    def get(tls: str | None) -> Peer:
        if tls not in peers:
            peers[tls] = Peer(16 * MIB, tls)
        return peers[tls]

    yield get
    for peer in peers.values():
        peer.close()


@pytest.fixture(scope="session")
def untouched_peer() -> Iterator[Callable[[str | None], Peer]]:
    """For tests that neither write to it nor end it."""
    with shared_peers() as get:
        yield get


@pytest.fixture(scope="session")
def written_peer() -> Iterator[Callable[[str | None], Peer]]:
    """For tests that write to it and do not end it."""
    with shared_peers() as get:
        yield get


@pytest.fixture
def make_client() -> Iterator[Callable[[int, str | None], Client]]:
    clients: list[Client] = []

    def make(length: int, tls: str | None) -> Client:
        clients.append(Client(length, tls))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
