"""Blocks through a client's connection, against a real memory node."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import checksums, load_library
from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import Committed, Fill, Peek, Pull, Reserve, Store, Stored
from polarkv_sglang.transport.stream import Answer, Call, Exchange
from tests.pool.rank import a_rank, prompt
from tests.pool.streams import BLOCK, PIECE, PRESENT, RESERVED, Memory, call, keys, pull, send, store
from tests.pool.test_node import eventually
from tests.support import RunningNode


# From 2 MiB on the pages are lent to the socket.
@pytest.mark.parametrize("count", [1, 3, 200, 400])
def test_blocks_come_back_as_they_were_stored(control: ControlConnection, node: RunningNode, count: int):
    source, target = Memory(count), Memory(count, seed=1)
    assert store(control, source, keys(count)) == [RESERVED] * count
    assert len(pull(control, target, keys(count)).checksum_blob) == 8 * count
    assert (target.blocks() == source.blocks()).all()
    now = node.statistics()
    assert (now.sent_blocks_total, now.sent_bytes_total) == (count, count * BLOCK)
    assert (now.blocks, now.reservations) == (count, 0)
    eventually(lambda: node.statistics().leases == 0)


def test_what_is_reserved_first_is_filled_and_committed(control: ControlConnection, node: RunningNode):
    source, target = Memory(4), Memory(4, seed=1)
    under = keys(4)
    reserved = control.request(Reserve(control.next_id(), under, NO_PARENT + under[:-16], BLOCK), 5.0)
    answer = call(control, Fill(control.next_id(), reserved.reservation), source)
    assert isinstance(answer, Answer)
    assert isinstance(answer.reply, Committed)
    assert answer.reply.count == 4
    pull(control, target, under)
    assert (target.blocks() == source.blocks()).all()


def test_pull_ends_at_the_first_block_that_is_not_there_or_has_another_length(control: ControlConnection):
    source, target = Memory(2), Memory(3, seed=1)
    store(control, source, keys(2))
    before = target.blocks()[1:].copy()
    assert len(pull(control, target, keys(1) + keys(1, 99) + keys(1, 2)).checksum_blob) == 8
    assert (target.blocks()[0] == source.blocks()[0]).all()
    assert (target.blocks()[1:] == before).all()
    assert pull(control, target, keys(2), BLOCK - 1).checksum_blob == b""


def test_bytes_of_a_block_that_is_there_are_for_nobody(control: ControlConnection):
    source, other, target = Memory(1), Memory(3, seed=5), Memory(3, seed=1)
    store(control, source, keys(1, 2))
    assert store(control, other, keys(3)) == [RESERVED, PRESENT, RESERVED]
    pull(control, target, keys(3))
    assert (target.blocks()[0::2] == other.blocks()[0::2]).all()
    assert (target.blocks()[1] == source.blocks()[0]).all()


@pytest.mark.parametrize("count", [3, 400])
def test_block_with_another_checksum_than_expected_is_not_stored(
    control: ControlConnection, node: RunningNode, count: int
):
    source = Memory(count)
    source.sums[1] ^= np.uint64(1)
    store(control, source, keys(count), source.sums)
    assert control.request(Peek(control.next_id(), keys(count)), 5.0).present == b"\1\0" + b"\1" * (count - 2)
    assert node.statistics().reservations == 0


def test_exchange_that_is_used_again_answers_for_each_batch_alone(control: ControlConnection):
    exchange, answers = Exchange(load_library()), []
    sources = [Memory(count, seed=count) for count in (3, 200, 1)]
    for first, source in zip((1, 10, 300), sources):
        under = keys(len(source.sums), first)
        request = Store(control.next_id(), under, (NO_PARENT + under)[: len(under)], BLOCK)
        expected = source.sums.copy()
        expected[0] ^= np.uint64(first == 1)
        call = Call(control, request, source.addresses, expected)
        answers += exchange.run([call], PIECE, time.monotonic() + 5.0)
    assert [answer.right for answer in answers] == [b"\0\1\1", b"\1" * 200, b"\1"]
    assert [answer.reply.states for answer in answers] == [bytes(3), bytes(200), bytes(1)]
    got = []
    for under, found in ((keys(200, 10), 200), (keys(3), 0), (keys(3, 209), 1), (keys(2, 300), 1)):
        target = Memory(len(under) // 16, seed=7)
        pull = Pull(control.next_id(), under, BLOCK)
        got += exchange.run([Call(control, pull, target.addresses)], PIECE, time.monotonic() + 5.0)
        assert got[-1].right == b"\1" * found
    assert [len(answer.reply.checksum_blob) // 8 for answer in got] == [200, 0, 1, 1]
    assert exchange.run([], PIECE, time.monotonic() + 5.0) == []


@pytest.mark.parametrize("count", [6, 64], ids=["unasked", "asked"])
def test_put_tells_what_is_written_from_what_was_there_and_what_is_wrong(node: RunningNode, count: int):
    blocks = prompt("mixed", count)
    with a_rank(node.address, ucx_tls="tcp", deadline_s=5.0) as rank:
        assert rank.put(blocks.part(slice(2))) == [True, True]
        pieces = rank.pieces(count)
        sums = checksums(load_library(), pieces.addresses, pieces.piece_bytes)
        sums[[0, count - 1]] ^= np.uint64(1)
        written = rank.client.put(blocks, pieces, sums)
        assert written.tolist() == [True] * (count - 1) + [False]
        now = rank.client.statistics()
        assert (now.put_blocks, now.present_blocks) == (2 + count - 3, 2)
        assert rank.get(blocks) == [True] * (count - 1) + [False]


def test_large_batches_ask_first_and_send_nothing_twice(node: RunningNode):
    """64 blocks of 48 KiB are more than goes out unasked."""
    blocks = prompt("large", 64)
    with a_rank(node.address, ucx_tls="tcp", deadline_s=5.0) as rank:
        before = rank.memory.copy()
        assert all(rank.put(blocks))
        assert all(rank.put(blocks))
        assert all(rank.get(blocks))
        assert (rank.memory == before).all()
    assert node.statistics().commits_total == 64


def test_a_client_that_was_dropped_is_collected_without_a_crash(node: RunningNode):
    command = [sys.executable, "-m", "tests.pool.collected", node.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "collected\n"), done.stderr


def test_requests_behind_a_store_are_answered_after_it(control: ControlConnection):
    source, under = Memory(3), keys(3)
    words = pack_u64(source.sums.tolist()) + b"\1\1\1"
    frame = bytes(encode_frame(Store(7, under, NO_PARENT + under[:-16], BLOCK)))
    peeks = b"".join(bytes(encode_frame(Peek(number, under))) for number in range(50))
    send(control, frame + source.blocks().tobytes() + words + peeks)
    deadline = time.monotonic() + 5.0
    assert control.receive(deadline) == Stored(7, bytes(3))
    for number in range(50):
        reply = control.receive(deadline)
        assert (reply.request_id, reply.present) == (number, b"\1\1\1")


def test_any_number_of_stores_may_come_at_once(control: ControlConnection):
    count = 3000
    send(control, bytes(encode_frame(Store(1, b"", b"", 1))) * count)
    for _ in range(count):
        assert control.receive(time.monotonic() + 5.0) == Stored(1, b"")
