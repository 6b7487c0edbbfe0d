"""Real peers in processes of their own, and a client with registered memory to reach them from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from polarkv_sglang.transport import (
    OPERATION,
    Context,
    Direction,
    Endpoint,
    RemoteKey,
    Worker,
    load_library,
)

MIB = 1 << 20


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

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()

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
        """Returns once every thread has stopped: the signal only asks for it."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in tasks.glob("*/stat")):
            time.sleep(0.001)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Client:
    """A worker and `length` bytes of registered local memory."""

    def __init__(self, length: int, tls: str | None) -> None:
        self.context = Context(load_library(), tls=tls)
        self.buffer = np.zeros(length, np.uint8)
        self.memory = self.context.register(self.buffer.ctypes.data, length)
        self.worker = Worker(self.context)

    def connect(self, peer: Peer) -> tuple[Endpoint, RemoteKey]:
        endpoint = self.worker.connect(peer.address)
        return endpoint, endpoint.unpack(peer.rkey)

    def operations(self, count: int, size: int, *peers: Peer) -> np.ndarray:
        """`count` operations of `size` bytes that go round the peers, at offsets that walk through memory."""
        operations = np.zeros(count, OPERATION)
        index = np.arange(count)
        offsets = index * size
        operations["length"] = size
        operations["endpoint"] = index % len(peers)
        operations["local"] = self.memory.address + offsets % self.memory.length
        bases = np.array([peer.base for peer in peers], np.uint64)
        operations["remote"] = bases[operations["endpoint"]] + offsets % peers[0].length
        return operations

    def transfer(
        self,
        direction: Direction,
        operations: np.ndarray,
        lanes: list[tuple[Endpoint, RemoteKey]],
        deadline_s: float = 20.0,
    ) -> np.ndarray:
        endpoints, keys = zip(*lanes, strict=True)
        return self.worker.transfer(direction, operations, endpoints, [self.memory], keys, deadline_s)


@pytest.fixture(params=[None, "tcp"], ids=["default", "tcp"])
def tls(request: pytest.FixtureRequest) -> str | None:
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


@pytest.fixture(scope="session")
def untouched_peer() -> Iterator[Callable[[str | None], Peer]]:
    """A peer of 16 MiB for each `tls`, shared by the tests that neither write to it nor end it."""
    peers: dict[str | None, Peer] = {}

    def get(tls: str | None) -> Peer:
        if tls not in peers:
            peers[tls] = Peer(16 * MIB, tls)
        return peers[tls]

    yield get
    for peer in peers.values():
        peer.close()


@pytest.fixture
def make_client() -> Iterator[Callable[[int, str | None], Client]]:
    clients: list[Client] = []

    def make(length: int, tls: str | None) -> Client:
        clients.append(Client(length, tls))
        return clients[-1]

    yield make
    for client in clients:
        client.context.close()
