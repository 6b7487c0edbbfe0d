"""Which blocks go for new ones, and which stay."""

from __future__ import annotations

import random
import time

import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport.messages import KeyState
from tests.pool.small import SEGMENT, SLOT, Pool, chain


def test_one_call_does_so_much_and_the_next_carries_on():
    """Both segments have to stay: only leaves go, which are 4 KiB each where 64 MiB are wanted."""
    pool = Pool(segments=2, segment_bytes=16384 * SLOT, checked=False)
    keys = pool.fill(2 * 16384, 64)
    assert pool.index.hold(2, keys[::16384], 30.0).number
    assert pool.put(chain("large", 1), length=16384 * SLOT) == bytes([KeyState.NO_ROOM])
    assert pool.index.statistics().blocks == 2 * 16384 - 8192


def test_of_segments_with_as_many_blocks_the_one_goes_that_was_used_longest_ago():
    pool = Pool()
    keys = pool.fill(16, 1)
    for used in (keys[13:], keys[:8], keys[9:12]):  # and keys 8 and 12 not since they were written
        pool.use(used)
    assert pool.put(chain("other", 1), length=2 * SLOT) == bytes([KeyState.RESERVED])
    assert pool.present(keys) == [True] * 8 + [False] + [True] * 3 + [False] * 4


def test_tails_are_evicted_before_heads():
    pool = Pool()
    old = chain("old", 16)
    pool.put(old)
    pool.put(chain("new", 5))
    assert pool.present(old) == [True] * 11 + [False] * 5


def test_least_recently_used_chain_goes_first():
    pool = Pool()
    one, two = chain("one", 8), chain("two", 8)
    pool.put(one)
    pool.put(two)
    pool.use(one)
    pool.put(chain("new", 8))
    assert pool.present(one) == [True] * 8
    assert pool.present(two) == [False] * 8


def test_peek_does_not_keep_a_block_fresh():
    pool = Pool()
    one, two = chain("one", 8), chain("two", 8)
    pool.put(one)
    pool.put(two)
    pool.index.peek(one)
    pool.put(chain("new", 8))
    assert pool.present(one) == [False] * 8


def test_a_chain_longer_than_the_pool_keeps_its_head():
    pool = Pool()
    keys = chain("a", 20)
    for start in range(0, 20, 5):
        pool.put(keys[start : start + 5], head=keys[start - 1] if start else NO_PARENT)
    assert pool.present(keys) == [True] * 16 + [False] * 4


def test_leased_block_is_not_evicted_until_released():
    pool = Pool()
    keys = chain("a", 16)
    pool.put(keys)
    lease = pool.index.locate(1, keys, 10.0)
    assert pool.put(chain("b", 1)) == bytes([KeyState.NO_ROOM])
    assert pool.index.refused() == {"no_room": 1}
    pool.index.release(1, lease.number)
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])


def test_head_that_was_written_after_its_tail_is_not_evicted_before_it():
    pool = Pool()
    keys = chain("a", 2)
    pool.put(keys[1:], head=keys[0])
    pool.put(keys[:1])
    pool.put(chain("fill", 14))
    pool.use(keys[1:])
    pool.put(chain("new", 14))
    assert pool.present(keys) == [True, True]


def test_blocks_of_another_length_give_way_until_a_segment_is_free():
    pool = Pool()
    pool.put(chain("small", 16))
    assert pool.put(chain("large", 2), length=SEGMENT) == bytes([KeyState.RESERVED] * 2)
    assert pool.index.statistics().blocks == 8 + 2


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_leaves_go_in_the_order_of_their_last_use(batch: int):
    """Whatever part of them the policy looks at together, and however they were used meanwhile."""
    pool = Pool(eviction_batch=batch)
    rng = random.Random(batch)
    order = [chain(f"{number:02}", 1)[0] for number in range(16)]
    for key in order:
        pool.put([key])
    for number in range(200):
        used = rng.sample(order, 3)
        pool.use(used)
        order = [key for key in order if key not in used] + used[::-1]
        new = chain(f"n{number}", 1)
        pool.put(new)
        assert pool.present(order) == [False] + [True] * 15
        order = order[1:] + new


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_block_that_was_spared_for_its_reader_goes_first_once_that_has_ended(batch: int):
    pool = Pool(eviction_batch=batch)
    spared, *others = (chain(f"{number:02}", 1)[0] for number in range(16))
    for key in (spared, *others):
        pool.put([key])
    lease = pool.index.locate(1, [spared], 10.0)
    pool.use(others)
    pool.put(chain("a", 1))
    assert pool.present([spared, *others]) == [True] * 15 + [False]
    pool.index.release(1, lease.number)
    pool.put(chain("b", 1))
    assert pool.present([spared, *others]) == [False] + [True] * 14 + [False]


def test_blocks_that_an_evicting_request_finds_present_stay_evictable():
    pool = Pool()
    old = chain("old", 16)
    for key in old:
        pool.put([key])
    keys = [old[0], *chain("a", 1), old[1]]
    assert pool.index.reserve(1, keys, [NO_PARENT] * 3, SLOT).states == bytes(
        [KeyState.PRESENT, KeyState.RESERVED, KeyState.PRESENT]
    )
    pool.index.check_integrity()
    assert pool.put(chain("new", 15)) == bytes([KeyState.RESERVED] * 15)
    assert pool.present(old) == [False] * 16


def test_blocks_of_another_length_cost_about_as_much_as_they_take():
    """Not most of the pool, until a segment happens to be free: what was used lately lies in all of them."""
    draw, pool = random.Random(1), Pool(segments=16, segment_bytes=256 * SLOT, checked=False)
    chains: list[list[bytes]] = []
    for number in range(400):  # 16,000 blocks, where there is room for 4096
        chains.append(chain(f"{number}x", draw.randrange(8, 72)))
        pool.put(chains[-1])
        for _ in range(3):
            pool.put(chains[-1 - draw.randrange(min(100, len(chains)))])
    assert pool.index.statistics().used_bytes == 4096 * SLOT
    for number in range(10):
        before, new = pool.index.statistics().blocks, chain(f"{number}y", 40)
        pool.put(new, length=2 * SLOT)
        assert pool.present(new) == [True] * 40
        assert before + 40 - pool.index.statistics().blocks <= 256 + 2 * 80, "a segment, and as much again"
    assert pool.index.statistics().used_bytes >= 0.9 * 4096 * SLOT
    pool.index.check_integrity()


def test_many_small_blocks_make_room_for_large_ones():
    """More of them than one call may evict: a segment of theirs is emptied all the same."""
    pool = Pool(segments=2, segment_bytes=16384 * SLOT, checked=False)
    pool.fill(2 * 16384, 64)
    assert pool.put(chain("large", 1), length=16384 * SLOT) == bytes([KeyState.RESERVED])
    assert pool.index.statistics().blocks > 8000


@pytest.mark.parametrize("written", [False, True])
def test_a_segment_with_a_block_that_is_written_or_held_is_not_emptied(written: bool):
    pool, oldest = Pool(), chain("a", 1)
    for name in "abcd":
        pool.put(chain(name, 4))
    if written:  # where the oldest tail was
        number = pool.index.reserve(2, chain("e", 1), [NO_PARENT], SLOT).number
    else:  # which is no use
        number = pool.index.hold(2, oldest, 30.0).number
    assert number
    for name in "012345":
        pool.put(chain(name, 2), length=2 * SLOT)
        assert pool.present(chain(name, 2)) == [True] * 2
        assert written or pool.present(oldest) == [True]
    if written:
        assert pool.index.commit(2, number, b"\1", [7]) == 1


def test_where_no_segment_can_be_emptied_little_goes():
    pool = Pool(segments=64, segment_bytes=512 * SLOT, checked=False)
    keys = pool.fill(64 * 512, 1)
    assert pool.index.hold(2, keys[511::512], 30.0).number
    before = pool.index.statistics().blocks
    assert pool.put(chain("x", 1), length=2 * SLOT) == bytes([KeyState.NO_ROOM])
    assert before - pool.index.statistics().blocks <= 2


def test_leaves_that_are_held_do_not_stop_writers():
    """However many: they are no leaves meanwhile."""
    pool = Pool(segments=6144, checked=False)
    held = pool.fill(3 * 8192, 1)[:8192]
    hold = pool.index.hold(7, held, 30.0)
    assert hold.number
    assert pool.put(chain("new", 8)) == bytes([KeyState.RESERVED] * 8)
    assert pool.present(held) == [True] * 8192
    pool.index.release(7, hold.number)
    assert pool.put(chain("newer", 8)) == bytes([KeyState.RESERVED] * 8)
    assert pool.present(held) == [False] * 8 + [True] * 8184, "the oldest go again once nobody holds them"


def test_one_long_chain_goes_as_quickly_as_many_short_ones():
    """Each eviction leaves another one as its only leaf, for which not all blocks are looked through."""

    def seconds(length: int) -> float:
        pool = Pool(segments=8192, checked=False)
        pool.fill(4 * 8192, length)
        began = time.thread_time()
        assert pool.put(chain("new", 1000)).count(KeyState.RESERVED) == 1000
        return time.thread_time() - began

    assert min(seconds(4 * 8192) for _ in range(3)) < 20 * min(seconds(8) for _ in range(3))


def test_what_is_written_read_or_continued_is_not_evicted():
    pool = Pool()
    heads, leased, pending, idle = (chain(name, 4) for name in ("heads", "leased", "pending", "idle"))
    reservation = pool.index.reserve(1, pending, [NO_PARENT] * 4, SLOT)
    for keys in (heads, leased, idle):
        states = pool.index.reserve(2, keys, [NO_PARENT, *keys[:-1]], SLOT)
        assert pool.index.commit(2, states.number, b"\1" * 4, [0] * 4) == 4
    pool.index.locate(1, leased, 10.0)
    pool.index.locate(1, heads[-1:], 10.0)
    asked = pool.index.reserve(1, chain("new", 6), [NO_PARENT] * 6, SLOT)
    assert asked.states == bytes([KeyState.RESERVED] * 4 + [KeyState.NO_ROOM] * 2)
    assert pool.present(heads + leased) == [True] * 8
    assert pool.present(idle) == [False] * 4
    assert pool.index.commit(1, reservation.number, b"\1" * 4, [0] * 4) == 4
    pool.index.check_integrity()
