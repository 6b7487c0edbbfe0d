from __future__ import annotations

import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.index import RESERVATION_S, Index
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.messages import MAX_LEASE_S, KeyState

BASE = 1 << 40
SEGMENT = 4 * 4096
SLOT = 4096


class Pool:
    """An index on four segments of four slots, with a clock of its own."""

    def __init__(self, segments: int = 4) -> None:
        self.now = 100.0
        self.index = Index(Slab(BASE, segments * SEGMENT, SEGMENT), clock=lambda: self.now)

    def put(self, keys: list[bytes], *, head: bytes = NO_PARENT, length: int = SLOT) -> bytes:
        """Reserve and commit a chain; the states."""
        reservation = self.index.reserve(1, keys, [head, *keys[:-1]], length)
        count = reservation.states.count(KeyState.RESERVED)
        if count:
            assert self.index.commit(1, reservation.number, b"\1" * count, list(range(count))) == count
        self.index.check_integrity()
        return reservation.states

    def present(self, keys: list[bytes]) -> list[bool]:
        return [flag == 1 for flag in self.index.peek(keys)]


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{position:03}".encode().ljust(16) for position in range(length)]


def test_block_is_invisible_until_committed():
    pool = Pool()
    keys = chain("a", 2)
    reservation = pool.index.reserve(1, keys, [NO_PARENT, keys[0]], SLOT)
    assert reservation.states == bytes([KeyState.RESERVED] * 2)
    assert pool.present(keys) == [False, False]
    assert pool.index.locate(1, keys, 1.0).number == 0
    assert pool.index.commit(1, reservation.number, b"\1\0", [7, 8]) == 1
    assert pool.present(keys) == [True, False]
    assert pool.index.locate(1, keys, 1.0).checksums == [7, 0]
    pool.index.check_integrity()


def test_second_writer_of_a_key_is_told_busy_then_present():
    pool = Pool()
    keys = chain("a", 1)
    first = pool.index.reserve(1, keys, [NO_PARENT], SLOT)
    assert pool.index.reserve(2, keys, [NO_PARENT], SLOT).states == bytes([KeyState.BUSY])
    pool.index.commit(1, first.number, b"\1", [0])
    assert pool.index.reserve(2, keys, [NO_PARENT], SLOT).states == bytes([KeyState.PRESENT])


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
    pool.index.release(1, pool.index.locate(1, one, 1.0).number)
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
    assert pool.index.refused == {"no_room": 1}
    pool.index.release(1, lease.number)
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])


def test_lease_that_is_never_released_expires_when_room_is_needed():
    pool = Pool()
    pool.put(chain("a", 16))
    pool.index.locate(1, chain("a", 16), 1e9)
    pool.now += MAX_LEASE_S - 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.NO_ROOM])
    pool.now += 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])
    assert pool.index.statistics().expired_leases_total == 1


def test_reserved_slot_is_not_reused_before_it_expires():
    pool = Pool()
    keys = chain("a", 16)
    reservation = pool.index.reserve(1, keys, [NO_PARENT, *keys[:-1]], SLOT)
    pool.now += RESERVATION_S - 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.NO_ROOM])
    pool.now += 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])
    assert pool.index.commit(1, reservation.number, b"\1" * 16, [0] * 16) == 0
    assert pool.present(keys) == [False] * 16
    statistics = pool.index.statistics()
    assert (statistics.expired_reservations_total, statistics.late_commits_total) == (1, 16)


def test_aborted_slot_is_free_at_once():
    pool = Pool(segments=1)
    reservation = pool.index.reserve(1, chain("a", 1), [NO_PARENT], SEGMENT)
    pool.index.commit(1, reservation.number, b"\0", [0])
    assert pool.put(chain("b", 1), length=SEGMENT) == bytes([KeyState.RESERVED])


def test_commit_with_another_number_of_blocks_is_refused_and_changes_nothing():
    pool = Pool()
    keys = chain("a", 2)
    reservation = pool.index.reserve(1, keys, [NO_PARENT, keys[0]], SLOT)
    with pytest.raises(ValueError, match="1 entries commit 2"):
        pool.index.commit(1, reservation.number, b"\1", [0])
    assert pool.index.commit(1, reservation.number, b"\1\1", [0, 0]) == 2


def test_corrupt_block_is_gone_at_once_and_its_slot_waits_for_its_readers():
    pool = Pool(segments=1)
    keys = chain("a", 1)
    pool.put(keys, length=SEGMENT)
    lease = pool.index.locate(1, keys, 10.0)
    pool.index.report_corrupt(keys, lease.generations)
    assert pool.present(keys) == [False]
    assert pool.index.statistics().quarantined_blocks == 1
    assert pool.put(keys, length=SEGMENT) == bytes([KeyState.NO_ROOM])
    pool.index.release(1, lease.number)
    assert pool.put(keys, length=SEGMENT) == bytes([KeyState.RESERVED])
    assert pool.index.statistics().corrupt_total == 1


def test_late_report_does_not_drop_the_next_block_of_that_key():
    pool = Pool(segments=1)
    keys = chain("a", 1)
    pool.put(keys, length=SEGMENT)
    lease = pool.index.locate(1, keys, 10.0)
    pool.index.release(1, lease.number)
    pool.put(chain("b", 1), length=SEGMENT)
    pool.put(keys, length=SEGMENT)
    again = pool.index.locate(1, keys, 10.0)
    assert again.addresses == lease.addresses
    pool.index.report_corrupt(keys, lease.generations)
    assert pool.present(keys) == [True]


def test_blocks_of_another_length_give_way_until_a_segment_is_free():
    pool = Pool()
    pool.put(chain("small", 16))
    assert pool.put(chain("large", 2), length=SEGMENT) == bytes([KeyState.RESERVED] * 2)
    assert pool.index.statistics().blocks == 8 + 2


def test_block_longer_than_a_segment_is_refused_with_one_warning(caplog: pytest.LogCaptureFixture):
    pool = Pool()
    for _ in range(3):
        assert pool.put(chain("a", 1), length=SEGMENT + 1) == bytes([KeyState.NO_ROOM])
    assert pool.index.refused == {"too_long": 3}
    assert [record.message for record in caplog.records] == [
        "a block of 16385 B is longer than a segment of 16384 B and was refused; raise --segment"
    ]
