"""Blocks of a slab that is mapped, found by a directory that is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import load_library, share
from polarkv_sglang.transport.directory import (
    READ,
    UNKNOWN,
    WRONG,
    Looked,
    LookUp,
    open_directory,
)
from tests.transport.nearby import (
    ADDRESS,
    BASE,
    BYTES,
    GENERATION,
    KEY,
    LENGTH,
    NOTICES,
    SETS,
    VERSION,
    Node,
    keys,
)


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    for fd in made.fds:
        os.close(fd)


def read(node: Node, *numbers: int, timeout_s: float = 10) -> tuple[Looked | None, np.ndarray]:
    """Blocks by their numbers, which are cut in three here, and their bytes."""
    directory, slab = node.share()
    memory = np.zeros((len(numbers), LENGTH), np.uint8)
    starts = memory.ctypes.data + np.arange(0, memory.size, LENGTH // 3, dtype=np.uint64)
    looked = LookUp(load_library()).read(
        [directory], None, keys(*numbers), starts.reshape(-1, 3), LENGTH // 3, timeout_s
    )
    directory.close()
    slab.close()
    return looked, memory


def test_blocks_that_it_has_are_read(node: Node):
    for number in (1, 2, 3):
        node.publish(number, place=number)
    node.publish(SETS + 2, place=9, way=3)
    looked, memory = read(node, 3, 1, SETS + 2)
    assert looked is not None
    assert looked.states == bytes([READ] * 3)
    assert looked.generations.tolist() == [103, 101, SETS + 102]
    assert [block.tobytes() for block in memory] == [node.block(3), node.block(1), node.block(9)]


def test_nodes_are_told_what_was_read_heads_last_if_there_is_room(node: Node):
    node.publish(1, place=1)
    node.publish(2, place=2)
    directory, slab = node.share()
    look_up, memory = LookUp(load_library()), np.zeros((2, LENGTH), np.uint8)
    starts = memory.ctypes.data + np.arange(2, dtype=np.uint64) * np.uint64(LENGTH)
    arguments = [directory], None, keys(1, 2), starts[:, None], LENGTH, 10.0
    assert look_up.read(*arguments) is not None
    assert not directory.untold
    told = node.ring[16:].reshape(-1, 8)
    assert node.ring[0] == 2
    assert told[:3, :3].tolist() == [[0, 2, 7], [0, 1, 7], [0, 0, 0]]
    before = node.ring.copy()
    before[0] = node.ring[0] = NOTICES - 1  # room for one
    assert look_up.read(*arguments) is not None
    assert directory.untold
    assert (node.ring == before).all()
    # One without a ring, and one of which nothing is asked.
    bare = open_directory(load_library(), share(node.fds[0], node.words.nbytes), slab)
    assert bare is not None
    assert look_up.read([bare], *arguments[1:]) is not None
    assert bare.untold
    assert look_up.read([bare], None, b"", starts[:0, None], LENGTH, 1.0) is not None
    for opened in (bare, directory, slab):
        opened.close()


def test_nothing_is_read_where_one_is_missing(node: Node):
    node.publish(1, place=1)
    looked, memory = read(node, 1, 5)
    assert looked is None
    assert not memory.any()


def test_blocks_of_several_nodes_are_read_at_once():
    nodes = [Node(), Node()]
    for place, node in enumerate(nodes):
        node.slab[:] = np.random.default_rng(place).integers(0, 256, len(node.slab), np.uint8)
        node.publish(4, place=2 + place)
    shared = [node.share() for node in nodes]
    memory = np.zeros((2, LENGTH), np.uint8)
    looked = LookUp(load_library()).read(
        [directory for directory, _ in shared],
        np.array([1, 0], np.uint32),
        keys(4, 4),
        np.array([[memory.ctypes.data], [memory.ctypes.data + LENGTH]], np.uint64),
        LENGTH,
        10.0,
    )
    assert looked is not None
    assert looked.states == bytes([READ] * 2)
    assert [block.tobytes() for block in memory] == [nodes[1].block(3), nodes[0].block(2)]
    for directory, slab in shared:
        directory.close()
        slab.close()


def test_a_block_that_is_not_what_was_written_is_told(node: Node):
    node.publish(1, place=1)
    node.slab[16_384 + 5000] ^= 1
    looked, _ = read(node, 1)
    assert looked is not None
    assert (looked.states, looked.generations.tolist()) == (bytes([WRONG]), [101])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        pytest.param(VERSION, 3, id="being written"),
        pytest.param(KEY, (1, 8), id="another key"),
        pytest.param(BYTES, LENGTH - 1, id="another length"),
        pytest.param(GENERATION, 0, id="empty"),
        pytest.param(ADDRESS, BASE - 1, id="before the slab"),
        pytest.param(ADDRESS, BASE + 16 * 16_384 - LENGTH + 1, id="beyond the slab"),
        pytest.param(ADDRESS, 2**64 - 1, id="at the end of the world"),
    ],
)
def test_the_node_is_asked_for_what_an_entry_does_not_tell(node: Node, word: int | slice, value: object):
    node.publish(1, place=1)[word] = value
    looked, memory = read(node, 1)
    assert looked is None
    assert not memory.any()


def test_what_is_not_read_in_time_is_unknown(node: Node):
    node.publish(1, place=1)
    looked, _ = read(node, 1, timeout_s=0)
    assert looked is not None
    assert looked.states == bytes([UNKNOWN])


def test_it_is_mapped_for_reading_only(node: Node):
    directory, slab = node.share()
    with open("/proc/self/maps") as maps:
        modes = [line.split()[1] for line in maps if line.startswith(f"{directory.address:x}-")]
    assert modes == ["r--s"]
    directory.close()
    slab.close()
    with pytest.raises(TransportError, match="closed"):
        LookUp(load_library()).read([directory], None, keys(1), np.zeros((1, 1), np.uint64), 1, 1.0)


def test_what_is_no_directory_is_not_used(node: Node):
    _, slab = node.share()
    assert open_directory(load_library(), share(node.fds[1], 100), slab) is None
    slab.close()
