"""Blocks written to slots that a node has granted, and what it is told of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.transport import load_library
from polarkv_sglang.transport.directory import RING_BYTES, Directory
from polarkv_sglang.transport.publish import WAS_THERE, WRITTEN, Publish, Slots
from tests.transport.conftest import checksum
from tests.transport.nearby import BASE, LENGTH, NOTICES, Node, keys

PIECE = LENGTH // 3
FIRST, WORDS = 16, 8
TOLD, HEARD = 0, 8  # words of a ring
PLACES = 16  # for blocks, in the slab


class Writer:
    """A client of such a node, with random blocks of its own in pieces."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.directory, self.slab = node.share()
        self.ours, self.theirs = socket.socketpair()
        self.slots = Slots(load_library(), self.directory, self.ours.fileno())
        self.memory = np.random.default_rng(9).integers(0, 256, (PLACES, LENGTH), np.uint8)
        self.publish = Publish(load_library())

    def grant(self, *places: int) -> None:
        self.slots.replace(np.array([BASE + place * 16_384 for place in places], np.uint64))

    def addresses(self, count: int) -> np.ndarray:
        starts = self.memory.ctypes.data + np.arange(0, count * LENGTH, PIECE, dtype=np.uint64)
        return starts.reshape(-1, 3)

    def write(
        self, *numbers: int, expected: list[int] | None = None, timeout_s: float = 10.0
    ) -> bytes | None:
        """The first blocks, under keys of these numbers, each the parent of the next."""
        parents = keys(*[0, *numbers][: len(numbers)])
        sums = np.array(expected, np.uint64) if expected is not None else None
        return self.publish.write(
            self.slots, keys(*numbers), parents, self.addresses(len(numbers)), PIECE, sums, timeout_s
        )

    def block(self, number: int) -> bytes:
        return self.memory[number].tobytes()

    def notices(self) -> list[list[int]]:
        """What was told so far, oldest first: kind, key, parent, address and checksum."""
        told = int(self.node.ring[TOLD])
        return [
            [int(word) for word in self.node.ring[FIRST + at % NOTICES * WORDS :][:7]] for at in range(told)
        ]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.directory.close()
        self.slab.close()


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer(Node())
    yield made
    made.close()
    for fd in made.node.fds:
        os.close(fd)


def test_blocks_are_in_their_slots_before_they_are_told_of_heads_last(writer: Writer):
    writer.grant(5, 2, 9)
    assert writer.write(1, 2) == bytes([WRITTEN] * 2)
    assert [writer.node.block(place) for place in (5, 2)] == [writer.block(0), writer.block(1)]
    assert writer.notices() == [
        [2, 2, 7, 1, 7, BASE + 2 * 16_384, checksum(writer.block(1))],
        [2, 1, 7, 0, 7, BASE + 5 * 16_384, checksum(writer.block(0))],
    ]
    assert writer.slots.left == 1


def test_what_is_there_is_not_written_and_takes_no_slot(writer: Writer):
    writer.node.publish(2, place=4)
    before = writer.node.slab.copy()
    writer.grant(5)
    assert writer.write(1, 2) == bytes([WRITTEN, WAS_THERE])
    assert writer.notices()[0][:3] == [1, 2, 7]  # offered
    assert writer.slots.left == 0
    assert writer.write(2) == bytes([WAS_THERE])
    assert writer.write(1) == bytes([WAS_THERE])  # the node has not heard of it yet
    changed = np.flatnonzero(np.array(writer.node.slab) != before)
    assert changed.min() >= 5 * 16_384
    assert changed.max() < 5 * 16_384 + LENGTH


def test_what_was_read_and_is_gone_since_is_written_again(writer: Writer):
    """The node has not heard of the reading yet, which does not mean that the block is there."""
    writer.node.ring[FIRST : FIRST + 3] = 0, 1, 7
    writer.node.ring[TOLD] = 1
    writer.grant(5)
    assert writer.write(1) == bytes([WRITTEN])


def test_nothing_is_written_if_there_are_too_few_slots(writer: Writer):
    before = writer.node.slab.copy()
    writer.grant(5)
    assert writer.write(1, 2) is None
    assert (writer.node.slab == before).all()
    assert writer.notices() == []
    assert writer.slots.left == 1
    assert writer.write(1) == bytes([WRITTEN])


def test_nothing_is_written_if_the_ring_has_no_room(writer: Writer):
    writer.grant(*range(PLACES))
    writer.node.ring[TOLD] = NOTICES - 1
    assert writer.write(1, 2) is None
    assert writer.write(1) == bytes([WRITTEN])
    assert writer.write(2) is None
    writer.node.ring[HEARD] = 1
    assert writer.write(2) == bytes([WRITTEN])
    assert int(writer.node.ring[TOLD]) == NOTICES + 1
    assert writer.notices()[-1][:2] == [2, 2]


@pytest.mark.parametrize("heard", [NOTICES + 1, 1])
def test_a_node_that_has_heard_more_than_it_was_told_is_told_nothing(writer: Writer, heard: int):
    writer.grant(1)
    writer.node.ring[HEARD] = np.uint64(heard)
    assert writer.write(1) is None


def test_blocks_with_other_checksums_are_not_told_of(writer: Writer):
    writer.grant(1, 2, 3)
    sums = [checksum(writer.block(number)) for number in range(3)]
    sums[1] ^= 1
    assert writer.write(1, 2, 3, expected=sums) == bytes([WRITTEN, 0, WRITTEN])
    assert [notice[1] for notice in writer.notices()] == [3, 1]
    assert writer.slots.left == 0  # it was written to


def test_what_is_not_written_in_time_is_not_told_of(writer: Writer):
    writer.grant(1)
    assert writer.write(1, timeout_s=0.0) == bytes([0])
    assert writer.notices() == []


def test_a_node_that_has_ended_the_connection_is_written_nothing(writer: Writer):
    writer.grant(1)
    before = writer.node.slab.copy()
    writer.theirs.close()
    with pytest.raises(NodeError, match="closed the connection"):
        writer.write(1)
    assert (writer.node.slab == before).all()


def test_slots_outside_the_slab_are_none(writer: Writer):
    for address in (BASE - 4096, BASE + PLACES * 16_384 - 4096, 0, 2**64 - 4096):
        writer.slots.replace(np.array([address], np.uint64))
        assert writer.write(1) is None


def test_columns_of_other_lengths_are_refused(writer: Writer):
    writer.grant(1)
    for wanted, before, sums in [(keys(1, 2), keys(0), None), (keys(1), b"", None), (keys(1), keys(0), 2)]:
        expected = None if sums is None else np.zeros(sums, np.uint64)
        with pytest.raises(ValueError, match="for 1 blocks"):
            writer.publish.write(writer.slots, wanted, before, writer.addresses(1), PIECE, expected, 1.0)


def test_a_closed_directory_and_one_without_a_ring_are_refused(writer: Writer):
    directory, slab = writer.node.share()
    slots = Slots(load_library(), directory, writer.ours.fileno())
    directory.close()
    with pytest.raises(TransportError, match="closed"):
        writer.publish.write(slots, keys(1), keys(0), writer.addresses(1), PIECE, None, 1.0)
    directory, slab_too = writer.node.share()
    bare = Directory(load_library(), directory._mapped, slab)
    with pytest.raises(TransportError, match="no ring"):
        Slots(load_library(), bare, writer.ours.fileno())
    slab.length = RING_BYTES // 2
    with pytest.raises(TransportError, match="32768 bytes are no ring of 65536"):
        Directory(load_library(), directory._mapped, slab, slab)
    directory.close()
    slab.close()
    slab_too.close()
