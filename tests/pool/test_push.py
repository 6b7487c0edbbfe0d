"""Reads by put, against a real memory node: over tcp, where gets are emulated and TLS forbids streams."""

from __future__ import annotations

import random
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import Context, Direction, RegisteredMemory, Worker, load_library
from polarkv_sglang.transport.columns import pack_u64, seal, unpack_u64
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import (
    Commit,
    Fetch,
    Fetched,
    FetchState,
    NodeStatistics,
    Peek,
    Peeked,
    Release,
    Reserve,
    StartStream,
    Statistics,
)
from polarkv_sglang.transport.tls import client_context
from tests.certificates import Authority
from tests.pool.rank import a_rank, prompt
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node

PIECE = 8192
PIECES = 2
BLOCK = PIECE * PIECES
SENT, MISS, FAILED = FetchState.SENT, FetchState.MISS, FetchState.FAILED


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys(count: int) -> bytes:
    return b"".join(key(number) for number in range(1, count + 1))


class Rank:
    """A rank with registered memory, whose worker takes the node's puts unless it is frozen."""

    def __init__(self, node: RunningNode, *, frozen: bool = False) -> None:
        self.node = node
        self.frozen = frozen
        self.context = Context(load_library(), tls="tcp")
        self.buffer = np.zeros(1 << 20, np.uint8)
        self.memory = self.context.register(self.buffer.ctypes.data, self.buffer.nbytes)
        self.worker = Worker(self.context)
        self.control = node.connect()

    def targets(self, blocks: int) -> np.ndarray:
        """An address for each piece, [blocks, PIECES], all over the buffer."""
        places = random.Random(1).sample(range(self.memory.length // PIECE), blocks * PIECES)
        return (self.memory.address + np.array(places, np.uint64) * PIECE).reshape(blocks, PIECES)

    def received(self, targets: np.ndarray) -> np.ndarray:
        """The bytes at the targets, [blocks, BLOCK]."""
        offsets = targets.reshape(-1) - self.memory.address
        pieces = [self.buffer[offset : offset + PIECE] for offset in offsets.tolist()]
        return np.concatenate(pieces).reshape(len(targets), BLOCK)

    def request(
        self,
        wanted: bytes,
        targets: np.ndarray,
        timeout_s: float = 5.0,
        memories: list[RegisteredMemory] | None = None,
        regions: list[int] | None = None,
    ) -> Fetch:
        address = self.worker.address
        rkeys = [memory.packed_rkey() for memory in memories or [self.memory]]
        return Fetch(
            self.control.next_id(), wanted, timeout_s, address, rkeys, seal(address, rkeys), PIECES, PIECE,
            pack_u64(targets.reshape(-1).tolist()), pack_u64(regions or [0] * targets.size),
        )  # fmt: skip

    def answer(self, request: Fetch) -> Fetched:
        self.control.send(request)
        return self.fetched(request.timeout_s)

    def fetched(self, timeout_s: float = 5.0) -> Fetched:
        """The answer to a fetch that was sent."""
        if not self.frozen:
            assert self.worker.wait([self.control.fileno()], timeout_s + 5.0) is not None
        reply = self.control.receive(time.monotonic() + timeout_s + 5.0)
        assert isinstance(reply, Fetched)
        return reply

    def fetch(self, wanted: bytes, targets: np.ndarray, timeout_s: float = 5.0) -> Fetched:
        return self.answer(self.request(wanted, targets, timeout_s))

    def close(self) -> None:
        self.control.close()
        self.context.close()


@pytest.fixture
def rank(node: RunningNode) -> Iterator[Rank]:
    rank = Rank(node)
    yield rank
    rank.close()


@pytest.fixture
def blocks(node: RunningNode) -> np.ndarray:
    """What the node holds under ``keys(8)``; the checksum of each is 1000 + its position."""
    content = np.random.default_rng(3).integers(0, 256, (8, BLOCK), dtype=np.uint8)
    write(node, keys(8), content, [1000 + position for position in range(8)])
    return content


def write(node: RunningNode, under: bytes, content: np.ndarray, checksums: list[int]) -> None:
    context = Context(load_library(), tls="tcp")
    count, length = content.shape
    with node.connect() as control:
        parents = (NO_PARENT + under)[: len(under)]
        reserved = control.request(Reserve(control.next_id(), under, parents, length), 5.0)
        worker = Worker(context)
        endpoint = worker.connect(control.welcome.worker_address)
        remote_key = endpoint.unpack(control.welcome.rkey)
        memory = context.register(content.ctypes.data, content.nbytes)
        local = (content.ctypes.data + np.arange(count, dtype=np.uint64) * length).reshape(count, 1)
        status, _ = worker.transfer(
            Direction.PUT,
            [remote_key],
            np.zeros(count, np.uint32),
            unpack_u64(reserved.address_blob),
            local,
            length,
            [memory],
            10.0,
        )
        assert not status.any()
        control.request(
            Commit(control.next_id(), reserved.reservation, b"\1" * count, pack_u64(checksums)), 5.0
        )
    context.close()


def states(fetched: Fetched) -> list[FetchState]:
    return [FetchState(state) for state in fetched.states]


def test_blocks_arrive_in_the_pieces_of_a_clients_memory(rank: Rank, blocks: np.ndarray):
    targets = rank.targets(8)
    fetched = rank.fetch(keys(8), targets)
    assert states(fetched) == [SENT] * 8
    assert (rank.received(targets) == blocks).all()
    assert unpack_u64(fetched.checksum_blob).tolist() == list(range(1000, 1008))
    assert len(set(unpack_u64(fetched.generation_blob).tolist())) == 8
    now = rank.node.statistics()
    assert (now.sent_blocks_total, now.sent_bytes_total, now.failed_sends_total) == (8, 8 * BLOCK, 0)
    assert now.leases == 0


def test_pieces_of_a_block_may_lie_in_different_regions(rank: Rank, blocks: np.ndarray):
    other = np.zeros(1 << 20, np.uint8)
    memories = [rank.memory, rank.context.register(other.ctypes.data, other.nbytes)]
    targets = rank.targets(8)
    targets[:, 1] = other.ctypes.data + np.arange(8) * PIECE
    request = rank.request(keys(8), targets, memories=memories, regions=[0, 1] * 8)
    assert states(rank.answer(request)) == [SENT] * 8
    assert (other[: 8 * PIECE].reshape(8, PIECE) == blocks[:, PIECE:]).all()


def test_what_comes_after_the_first_miss_is_not_sent(rank: Rank, blocks: np.ndarray):
    targets = rank.targets(3)
    fetched = rank.fetch(key(1) + key(99) + key(2), targets)
    assert states(fetched) == [SENT, MISS, MISS]
    assert unpack_u64(fetched.checksum_blob).tolist() == [1000, 0, 0]
    assert (rank.received(targets[:1]) == blocks[0]).all()
    assert not rank.received(targets[1:]).any()
    assert rank.node.statistics().leases == 0


def test_block_of_another_length_is_a_miss(rank: Rank, blocks: np.ndarray):
    write(rank.node, key(50), np.ones((1, BLOCK + 1), np.uint8), [1])
    targets = rank.targets(1)
    assert states(rank.fetch(key(50), targets)) == [MISS]
    assert not rank.received(targets).any()


def test_client_that_registers_ever_new_memory_is_served(rank: Rank, blocks: np.ndarray):
    for _ in range(6):
        memories = [rank.context.register(rank.memory.address, rank.memory.length) for _ in range(64)]
        request = rank.request(keys(1), rank.targets(1), memories=memories, regions=[0, 63])
        assert states(rank.answer(request)) == [SENT]


def test_frozen_client_is_failed_in_time_and_served_once_it_thaws(rank: Rank, blocks: np.ndarray):
    assert states(rank.fetch(keys(1), rank.targets(1))) == [SENT]
    rank.frozen = True
    started = time.monotonic()
    assert states(rank.fetch(keys(2), rank.targets(2), timeout_s=0.5)) == [FAILED, FAILED]
    assert 0.4 < time.monotonic() - started < 3.0
    assert rank.node.statistics().failed_sends_total == 2
    rank.frozen = False
    targets = rank.targets(8)
    eventually(lambda: states(rank.fetch(keys(8), targets)) == [SENT] * 8)
    assert (rank.received(targets) == blocks).all()


def test_blocks_stay_leased_until_the_put_has_ended(rank: Rank, blocks: np.ndarray):
    rank.frozen = True
    rank.control.send(rank.request(keys(2), rank.targets(2), timeout_s=1.0))
    eventually(lambda: rank.node.statistics().leases == 1)
    assert states(rank.fetched()) == [FAILED] * 2
    assert rank.node.statistics().leases == 0


def test_frozen_clients_hold_up_nobody_else(node: RunningNode, rank: Rank, blocks: np.ndarray):
    frozen = [Rank(node, frozen=True) for _ in range(12)]
    try:
        for other in frozen:
            other.control.send(other.request(keys(8), other.targets(8), timeout_s=3.0))
        eventually(lambda: node.statistics().leases == len(frozen))
        started = time.monotonic()
        assert states(rank.fetch(keys(8), rank.targets(8))) == [SENT] * 8
        assert time.monotonic() - started < 1.5
        for other in frozen:
            assert states(other.fetched()) == [FAILED] * 8
    finally:
        for other in frozen:
            other.close()


def test_requests_behind_a_fetch_are_answered_after_it(rank: Rank, blocks: np.ndarray):
    rank.frozen = True
    rank.control.send(rank.request(keys(1), rank.targets(1), timeout_s=0.3))
    rank.control.send(Release(12345))
    for number in range(300):
        rank.control.send(Peek(number, keys(8)))
    deadline = time.monotonic() + 5.0
    assert isinstance(rank.control.receive(deadline), Fetched)
    for number in range(300):
        assert rank.control.receive(deadline) == Peeked(number, b"\1" * 8)


def test_client_lost_in_a_fetch_leaves_nothing_behind(node: RunningNode, rank: Rank, blocks: np.ndarray):
    process = psutil.Process(node.pid)

    def statistics() -> NodeStatistics:
        return rank.control.request(Statistics(rank.control.next_id()), 5.0)

    def lose_one() -> None:
        lost = Rank(node, frozen=True)
        lost.control.send(lost.request(keys(8), lost.targets(8), timeout_s=0.5))
        eventually(lambda: statistics().leases == 1)
        lost.close()
        eventually(lambda: (statistics().leases, statistics().connections) == (0, 1))

    lose_one()  # warms the node up
    threads, fds = process.num_threads(), process.num_fds()
    for _ in range(4):
        lose_one()
    eventually(lambda: process.num_threads() <= threads and process.num_fds() <= fds)


def test_node_that_is_told_to_stop_waits_for_its_puts_and_no_longer(rank: Rank, blocks: np.ndarray):
    rank.frozen = True
    rank.control.send(rank.request(keys(2), rank.targets(2), timeout_s=1.0))
    eventually(lambda: rank.node.statistics().leases == 1)
    rank.node.process.send_signal(signal.SIGTERM)
    assert rank.node.process.wait(5.0) == 0


@pytest.mark.parametrize(("field", "garbage"), [("worker_address", b"\xa5" * 200), ("rkeys", [b"\xa5" * 90])])
def test_garbage_never_reaches_ucx(rank: Rank, blocks: np.ndarray, field: str, garbage: object):
    request = rank.request(keys(1), rank.targets(1))
    msgspec.structs.force_setattr(request, field, garbage)
    with rank.node.connect() as control:
        control.send(request)
        with pytest.raises(NodeError):
            control.receive(time.monotonic() + 5.0)
    assert states(rank.fetch(keys(1), rank.targets(1))) == [SENT]
    assert rank.node.statistics().bad_frames_total == 1


def test_rank_with_tls_reads_by_put_and_writes_over_ucx(tmp_path: Path):
    authority = Authority(tmp_path / "authority")
    files = authority.issue("node")
    flags = ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca, "--ucx-tls", "tcp"]
    tls = client_context(*authority.issue("client"))
    blocks = prompt("push", 12)
    with (
        running_node("64MiB", *flags) as node,
        a_rank(node.address, ucx_tls="tcp", tls=tls, deadline_s=5.0) as rank,
    ):
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * 12
        assert rank.get(blocks) == [True] * 12
        assert (rank.memory == before).all()
        operations = [
            lane.worker.statistics().blocks for lane in (rank.client._put_lane, rank.client._get_lane)
        ]
        assert operations == [12 + 1, 1]  # and a little, to see that the node can be reached
        with secured(node, tls) as control:
            control.send(StartStream(1))
            with pytest.raises(NodeError):
                control.receive(time.monotonic() + 5.0)
        with secured(node, tls) as control:
            now = control.request(Statistics(1), 5.0)
            assert (now.reservations, now.bad_frames_total) == (0, 1), "refused, but reserved"


def secured(node: RunningNode, tls: ssl.SSLContext) -> ControlConnection:
    return ControlConnection.connect(
        node.address, token=None, role="rank", client="test", deadline_s=5.0, tls=tls
    )
