"""Slots that writers on a node's host have ahead, and what they tell of them in their rings."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport import checksums
from polarkv_sglang.transport.directory import RING_BYTES
from polarkv_sglang.transport.messages import MAX_GRANTED, RESERVATION_S, KeyState, Reserve
from tests.pool.rank import DEADLINE_S, PIECE_BYTES, a_rank, prompt, wait_until_live
from tests.pool.rings import NOTICES, OFFERED, READ, WRITTEN, Ring
from tests.pool.small import SLOT, Pool, chain
from tests.pool.test_node import eventually
from tests.support import running_node

OWNER, OTHER = 1, 2


@contextlib.contextmanager
def neighbours(*owners: int, segments: int = 4, slots: int = 8) -> Iterator[tuple[Pool, list[Ring]]]:
    """A small pool of which some owners may have so many slots ahead."""
    pool = Pool(segments, most_granted=slots * SLOT)
    rings = [Ring() for _ in owners]
    for owner, ring in zip(owners, rings):
        pool.index.open_ring(owner, ring.memory)
    yield pool, rings
    pool.index.check_integrity()
    for owner, ring in zip(owners, rings):
        pool.index.close_ring(owner)
        ring.close()
    pool.index.check_integrity()


# ---- What the index makes of it.


def test_a_block_is_there_once_its_writer_has_told_of_it():
    with neighbours(OWNER) as (pool, [ring]):
        keys = chain("block", 3)
        addresses = pool.index.grant(OWNER, SLOT, 3)
        assert len({*addresses}) == 3
        assert pool.present(keys) == [False] * 3
        statistics = pool.index.statistics()
        assert (statistics.granted_bytes, statistics.used_bytes, statistics.blocks) == (3 * SLOT, 0, 0)
        for number, key in enumerate(keys[:2]):
            ring.tell(WRITTEN, key, keys[number - 1] if number else NO_PARENT, addresses[number], 70 + number)
        located = pool.index.locate(OTHER, keys, 1.0)
        assert located.addresses == [*addresses[:2], 0]
        assert located.checksums == [70, 71, 0]
        assert located.lengths == [SLOT, SLOT, 0]
        assert pool.index.describe(keys).parents == [NO_PARENT, keys[0], NO_PARENT]
        statistics = pool.index.statistics()
        assert (statistics.granted_bytes, statistics.used_bytes, statistics.blocks) == (SLOT, 2 * SLOT, 2)
        assert statistics.commits_total == 2


@pytest.mark.parametrize("look", ["locate", "hold", "peek", "describe", "reserve", "statistics", "expire"])
def test_whoever_looks_is_told_of_it_first(look: str):
    with neighbours(OWNER) as (pool, [ring]):
        [key] = chain("block", 1)
        ring.tell(WRITTEN, key, NO_PARENT, pool.index.grant(OWNER, SLOT, 1)[0])
        index = pool.index
        match look:
            case "locate":
                assert index.locate(OTHER, [key], 1.0).addresses != [0]
            case "hold":
                assert index.hold(OTHER, [key], 1.0)[1] == b"\1"
            case "peek":
                assert index.peek([key]) == b"\1"
            case "describe":
                assert index.describe([key]).lengths == [SLOT]
            case "reserve":
                assert index.reserve(OTHER, [key], [NO_PARENT], SLOT).states == bytes([KeyState.PRESENT])
            case "statistics":
                assert index.statistics().blocks == 1
            case "expire":
                index.expire()
        assert ring.waiting == 0


def test_what_is_there_or_being_written_stays_as_it_is_and_the_slot_is_free():
    with neighbours(OWNER) as (pool, [ring]):
        [here, coming] = chain("block", 2)
        pool.put([here])
        before = pool.index.locate(OTHER, [here], 1.0)
        assert pool.index.reserve(OTHER, [coming], [here], SLOT).number
        for key, address in zip((here, coming), pool.index.grant(OWNER, SLOT, 2)):
            ring.tell(WRITTEN, key, NO_PARENT, address, 99)
        assert pool.index.locate(OTHER, [here], 1.0)[1:] == before[1:]
        assert pool.present([coming]) == [False]
        assert pool.index.statistics().granted_bytes == 0
        assert pool.index.statistics().used_bytes == 2 * SLOT


def test_a_head_that_comes_after_its_tail_goes_after_it_too():
    with neighbours(OWNER, segments=1) as (pool, [ring]):
        head, tail = chain("block", 2)
        addresses = pool.index.grant(OWNER, SLOT, 2)
        ring.tell(WRITTEN, tail, head, addresses[1])
        assert pool.present([head, tail]) == [False, True]
        ring.tell(WRITTEN, head, NO_PARENT, addresses[0])
        assert pool.present([head, tail]) == [True, True]
        pool.use([head])
        pool.use([tail])  # the latest: but for its tail the head would go
        pool.put(chain("new", 3))
        assert pool.present([head, tail]) == [True, False]


def test_slots_that_are_not_its_own_are_nobodys_to_tell_of():
    with neighbours(OWNER, OTHER) as (pool, [ring, others]):
        [key] = chain("block", 1)
        pool.put(chain("here", 1))
        [granted] = pool.index.grant(OWNER, SLOT, 1)
        taken = pool.index.locate(OTHER, chain("here", 1), 1.0).addresses[0]
        others.tell(WRITTEN, key, NO_PARENT, granted)
        for address in (taken, 1, 2**64 - 1, granted + 1):
            ring.tell(WRITTEN, key, NO_PARENT, address)
        assert pool.present([key]) == [False]
        assert pool.index.statistics().late_commits_total == 5
        assert pool.index.statistics().granted_bytes == SLOT
        ring.tell(WRITTEN, key, NO_PARENT, granted)
        ring.tell(WRITTEN, chain("twice", 1)[0], NO_PARENT, granted)
        assert pool.present([key, *chain("twice", 1)]) == [True, False]


def test_a_grant_ends_with_its_time_and_with_the_next_one():
    with neighbours(OWNER) as (pool, [ring]):
        first = pool.index.grant(OWNER, SLOT, 4)
        second = pool.index.grant(OWNER, 2 * SLOT, 2)
        assert pool.index.statistics().granted_bytes == 4 * SLOT
        ring.tell(WRITTEN, chain("old", 1)[0], NO_PARENT, next(a for a in first if a not in second))
        assert pool.present(chain("old", 1)) == [False]
        pool.now += RESERVATION_S - 0.001
        pool.index.expire()
        assert pool.index.statistics().granted_bytes == 4 * SLOT
        pool.now += 0.001
        pool.index.expire()
        ring.tell(WRITTEN, chain("late", 1)[0], NO_PARENT, second[0])
        assert pool.present(chain("late", 1)) == [False]
        statistics = pool.index.statistics()
        assert (statistics.granted_bytes, statistics.late_commits_total) == (0, 2)


def test_of_who_is_gone_what_was_told_is_kept_and_what_was_not_until_its_time_is_over():
    """It may be writing still: nobody else may be given its slots."""
    with neighbours(OWNER, OTHER, segments=1) as (pool, [ring, _]):
        [key] = chain("told", 1)
        ring.tell(WRITTEN, key, NO_PARENT, pool.index.grant(OWNER, SLOT, 4)[0])
        pool.index.close_ring(OWNER)
        assert pool.present([key]) == [True]
        assert pool.index.hold(OTHER, [key], 60.0)[0]
        assert pool.put(chain("other", 1)) == bytes([KeyState.NO_ROOM])
        ring.tell(WRITTEN, chain("dead", 1)[0], NO_PARENT, 1)  # nobody hears that
        pool.now += RESERVATION_S
        assert pool.put(chain("other", 3)) == bytes([KeyState.RESERVED] * 3)
        assert ring.waiting == 1


def test_who_tells_more_than_a_ring_holds_is_not_listened_to_any_more():
    with neighbours(OWNER) as (pool, [ring]):
        addresses = pool.index.grant(OWNER, SLOT, 2)
        ring.tell(WRITTEN, chain("block", 1)[0], NO_PARENT, addresses[0])
        assert pool.present(chain("block", 1)) == [True]
        ring.jump(NOTICES + 1)
        ring.tell(WRITTEN, chain("after", 1)[0], NO_PARENT, addresses[1])
        assert pool.present(chain("after", 1)) == [False]
        assert pool.index.grant(OWNER, SLOT, 2) == []
        pool.now += RESERVATION_S
        pool.index.expire()
        assert pool.index.statistics().granted_bytes == 0


def test_a_ring_goes_round():
    with neighbours(OWNER) as (pool, [ring]):
        for number in range(3 * NOTICES):
            ring.tell(READ, number.to_bytes(16, "big"))
            if number % 1000 == 0:
                assert pool.index.statistics().hits_total == number + 1
        assert pool.index.statistics().hits_total == 3 * NOTICES


def test_what_is_told_to_be_read_or_offered_again_is_fresh_and_only_reads_are_hits():
    with neighbours(OWNER) as (pool, [ring]):
        one, two, three = chain("one", 5), chain("two", 5), chain("three", 5)
        for keys in (one, two, three):
            pool.put(keys)
        for key in reversed(one):
            ring.tell(READ, key)
        for key in reversed(two):
            ring.tell(OFFERED, key)
        pool.put(chain("new", 6))
        assert [sum(pool.present(keys)) for keys in (one, two, three)] == [5, 5, 0]
        assert pool.index.statistics().hits_total == 5
        pool.put(chain("next", 4))
        assert pool.present(one) == [True] + [False] * 4  # heads go last


def test_what_is_granted_has_limits_and_evicts_as_a_write_does():
    with neighbours(OWNER, segments=6, slots=3) as (pool, _):
        old = chain("old", 24)
        pool.put(old)
        assert pool.index.grant(OWNER, SLOT, 4) == []  # over its limit
        assert pool.present(old) == [True] * 24
        assert len(pool.index.grant(OWNER, SLOT, 3)) == 3
        assert pool.present(old) == [True] * 21 + [False] * 3
        assert pool.index.grant(OWNER, 5 * SLOT, 1) == []  # longer than a segment
        assert pool.index.grant(OTHER, SLOT, 1) == []  # it has no ring


def test_all_owners_together_have_an_eighth_of_the_slab_ahead():
    with neighbours(OWNER, OTHER, segments=8, slots=3) as (pool, _):
        assert len(pool.index.grant(OWNER, SLOT, 3)) == 3
        assert pool.index.grant(OTHER, SLOT, 2) == []
        assert len(pool.index.grant(OTHER, SLOT, 1)) == 1


def test_all_that_was_asked_for_is_granted_or_nothing():
    with neighbours(OWNER, segments=8) as (pool, _):
        here = chain("here", 30)
        pool.put(here)
        pool.put(chain("two", 2))
        assert pool.index.locate(OTHER, [*here, chain("two", 2)[0]], 60.0).number
        assert pool.index.grant(OWNER, SLOT, 2) == []  # there is room for one
        assert pool.index.statistics().granted_bytes == 0
        assert pool.put(chain("new", 1)) == bytes([KeyState.RESERVED])


def test_nothing_is_granted_for_a_while_after_somebody_found_no_room():
    """What is granted would keep segments from being emptied for him."""
    with neighbours(OWNER, segments=8) as (pool, _):
        keys = chain("held", 32)
        pool.put(keys)
        lease = pool.index.locate(OTHER, keys, 60.0).number
        assert pool.put(chain("none", 1)) == bytes([KeyState.NO_ROOM])
        pool.index.release(OTHER, lease)
        assert pool.index.grant(OWNER, SLOT, 1) == []
        pool.now += RESERVATION_S
        assert len(pool.index.grant(OWNER, SLOT, 1)) == 1


def test_who_was_refused_asks_for_few_again():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        [link] = rank.client._put_lane.links.values()
        assert link.granted is not None
        assert rank.put(prompt("first", 64)) == [True] * 64
        assert link.granted.awaited is not None
        assert link.granted.awaited.slots > 64
        link.granted.collect(time.monotonic() + 5)
        with node.connect() as other:  # nobody has such room
            too_many = b"".join(number.to_bytes(16, "big") for number in range(1, 101))
            other.request(Reserve(other.next_id(), too_many, too_many, 16 << 20), 5)
        link.granted.ask(64)
        link.granted.collect(time.monotonic() + 5)
        assert link.granted.unused.left == 0
        link.granted.ask(1)
        assert link.granted.awaited.slots == 16


def test_a_segment_with_a_granted_slot_is_not_emptied_for_blocks_of_another_length():
    with neighbours(OWNER, segments=1) as (pool, [ring]):
        pool.put(chain("old", 3))
        [address] = pool.index.grant(OWNER, SLOT, 1)
        assert pool.put(chain("long", 1), length=2 * SLOT) == bytes([KeyState.NO_ROOM])
        ring.tell(WRITTEN, chain("told", 1)[0], NO_PARENT, address)
        assert pool.put(chain("long", 1), length=2 * SLOT) == bytes([KeyState.RESERVED])


def test_most_of_a_node_that_one_writer_may_have_ahead():
    for capacity, most in [(2 << 30, 32 << 20), (1 << 40, 64 << 20), (1 << 20, 16 << 10)]:
        assert Index(Slab(1 << 40, capacity, 1 << 20)).most_granted_bytes == most
    _, node, _ = load_native()
    assert node.POLAR_MOST_GRANTED == MAX_GRANTED


def test_memory_of_another_size_is_no_ring():
    memory = SharedMemory("ring", RING_BYTES // 2)
    with pytest.raises(ValueError, match="32768 bytes are no ring of 65536"):
        Pool().index.open_ring(OWNER, memory)
    memory.close()


def test_garbage_in_a_ring_does_no_harm():
    dice = random.Random(3)
    with neighbours(OWNER, OTHER) as (pool, [ring, other]):
        pool.put(chain("here", 4))
        for _ in range(300):
            addresses = pool.index.grant(dice.choice((OWNER, OTHER)), SLOT, dice.randrange(1, 5)) or [0]
            for _ in range(dice.randrange(20)):
                dice.choice((ring, other)).tell(
                    dice.choice((READ, OFFERED, WRITTEN, 3, 2**63)),
                    dice.choice((dice.randbytes(16), *chain("here", 6))),
                    dice.choice((NO_PARENT, dice.randbytes(16), *chain("here", 6))),
                    dice.choice((*addresses, dice.randrange(2**64))),
                    dice.randrange(2**64),
                )
            pool.index.check_integrity()


# ---- What a client makes of it.


def test_small_and_large_puts_are_read_by_others_as_soon_as_they_return():
    with running_node("256MiB") as node, a_rank(node.address) as writer, a_rank(node.address) as reader:
        for count in (1, 2, 40, 1, 64):
            blocks = prompt(f"blocks {count}", count)
            assert writer.put(blocks) == [True] * count
            assert reader.client.peek(blocks) == count
            reader.memory[:] = 0
            assert reader.get(blocks) == [True] * count
            assert (reader.memory[:, :count] == writer.memory[:, :count]).all()
        assert writer.put(prompt("blocks 64", 64)) == [True] * 64
        assert writer.client.statistics().present_blocks >= 64
        assert node.statistics().commits_total == node.statistics().blocks


def test_what_a_node_has_not_heard_of_yet_is_not_written_again():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        assert rank.put(prompt("twice", 8)) == [True] * 8
        node.freeze()
        assert rank.put(prompt("twice", 9)) == [True] * 9
        statistics = rank.client.statistics()
        assert (statistics.put_blocks, statistics.present_blocks) == (9, 8)
        os.kill(node.pid, signal.SIGCONT)
        eventually(lambda: node.statistics().commits_total == 9)


def test_granted_slots_are_written_while_their_node_answers_nothing():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        before = rank.memory.copy()
        assert rank.put(prompt("first", 1)) == [True]
        node.freeze()
        started = time.monotonic()
        assert rank.put(prompt("frozen", 10)) == [True] * 10
        assert time.monotonic() - started < DEADLINE_S / 2
        assert rank.put(prompt("more", 10)) == [False] * 10  # than it had granted
        os.kill(node.pid, signal.SIGCONT)
        eventually(lambda: node.statistics().blocks == 11)
        wait_until_live(rank, 1)
        assert rank.get(prompt("frozen", 10)) == [True] * 10
        assert (rank.memory[:, :10] == before[:, :10]).all()


def test_slots_are_not_written_to_once_they_may_be_anothers():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        assert rank.put(prompt("first", 1)) == [True]
        [link] = rank.client._put_lane.links.values()
        assert link.granted is not None
        assert link.granted.unused.left == 15
        link.granted._asked_at -= RESERVATION_S - DEADLINE_S / 2  # a put may last longer than that
        node.freeze()
        assert rank.put(prompt("second", 1)) == [False]
        os.kill(node.pid, signal.SIGCONT)
        wait_until_live(rank, 1)
        assert rank.put(prompt("second", 1)) == [True]
        assert node.statistics().late_commits_total == 0


def test_who_writes_much_gets_more_slots_at_a_time():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        [link] = rank.client._put_lane.links.values()
        assert link.granted is not None
        left = []
        for number in range(80):
            assert rank.put(prompt(f"block {number}", 1)) == [True]
            if link.granted.awaited is None:
                left.append(link.granted.unused.left)
        assert (left[0], left[15], left[46]) == (15, 31, 63)


def test_a_put_to_a_node_that_is_gone_is_none():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        assert rank.put(prompt("first", 1)) == [True]
        node.kill()
        assert rank.put(prompt("gone", 20)) == [False] * 20
        assert rank.put(prompt("gone", 20)) == [False] * 20


def test_blocks_that_have_other_checksums_than_they_should_are_not_stored():
    with running_node("256MiB") as node, a_rank(node.address) as rank:
        pieces = rank.pieces(4)
        sums = checksums(rank.client.library, pieces.addresses, PIECE_BYTES)
        sums[2] += np.uint64(1)
        assert rank.client.put(prompt("sums", 4), pieces, sums).tolist() == [True, True, False, True]
        assert rank.get(prompt("sums", 4)) == [True, True, False, False]  # a prefix ends there
        assert node.statistics().blocks == 3


def test_blocks_of_several_lengths_and_more_than_there_are_slots_come_back(node_256: str):
    with a_rank(node_256) as rank:
        memory = np.random.default_rng(1).integers(0, 256, 24 << 20, np.uint8)
        before = memory.copy()
        rank.client.register(memory.ctypes.data, memory.nbytes)
        for turn, (length, count) in enumerate(
            [(4096, 300), (1 << 20, 4), (1 << 20, 5), (8 << 20, 2), (4097, 1), (4096, 256), (1 << 20, 3)] * 2
        ):
            blocks = prompt(f"lengths {turn}", count)
            start = memory.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(length)
            pieces = Pieces(start[:, None], length)
            assert rank.client.put(blocks, pieces).all()
            memory[:] = 0
            assert rank.client.get(blocks, pieces).all()
            assert (memory[: length * count] == before[: length * count]).all()
            memory[:] = before


def test_a_node_without_room_for_slots_is_asked_about_each_block():
    with running_node("64MiB", "--segment", "2MiB") as node, a_rank(node.address) as rank:
        held = []
        for number in range(40):
            blocks = prompt(f"held {number}", 64)
            if not all(rank.put(blocks)):
                break
            held.append(rank.client.hold(blocks, 60.0))
        blocks = prompt("one more", 30)
        rank.put(blocks)
        assert rank.client.peek(blocks) == rank.get(blocks).count(True)
        for kept in held:
            rank.client.drop(kept)
        time.sleep(1.1)  # a node without room is not asked for slots for a second
        assert rank.put(prompt("after", 30)) == [True] * 30


DYING_WRITER = """
import os, signal, sys
from tests.pool.rank import Rank, prompt
rank = Rank(sys.argv[1], deadline_s=5.0)
assert all(rank.put(prompt("dying", 10)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("all_of_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_writer_told_before_it_died_is_there_and_its_slots_come_back(all_of_it: bool):
    with running_node("256MiB") as node:
        command = [sys.executable, "-c", DYING_WRITER, node.address]
        root = Path(__file__).parents[2]
        assert subprocess.run(command, cwd=root, timeout=50, check=False).returncode == -signal.SIGKILL
        with a_rank(node.address) as rank:
            content = rank.memory.copy()  # which is what the other's was
            assert rank.client.peek(prompt("dying", 10)) == 10
            assert rank.get(prompt("dying", 10)) == [True] * 10
            assert (rank.memory[:, :10] == content[:, :10]).all()
        assert node.statistics().granted_bytes > 0
        if all_of_it:
            eventually(lambda: node.statistics().granted_bytes == 0, RESERVATION_S + 5)


@pytest.fixture(scope="module")
def node_256() -> Iterator[str]:
    with running_node("256MiB", "--segment", "16MiB") as node:
        yield node.address
