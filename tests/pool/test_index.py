from __future__ import annotations

import json
import random
import subprocess
import sys
import threading

import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport.messages import MAX_LEASE_S, RESERVATION_S, KeyState
from tests.pool.small import BASE, SEGMENT, SLOT, Pool, chain

MILLION = 1_000_000


def test_an_owner_finds_nothing_once_it_has_as_many_leases_as_it_may():
    pool = Pool(most_leased_rows=100)
    keys = chain("a", 2)
    pool.put(keys)
    numbers = [pool.index.locate(1, keys, 1.0).number for _ in range(10)]
    assert numbers.count(0) == 8
    assert pool.index.locate(1, keys, 1.0).lengths == [0, 0]
    assert pool.index.hold(1, keys, 1.0) == (0, b"\1\1")
    assert pool.index.locate(2, keys, 1.0).number
    pool.index.release(1, numbers[0])
    assert pool.index.locate(1, keys, 1.0).lengths == [SLOT] * 2
    pool.index.check_integrity()


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


def test_renewed_lease_holds_its_blocks_for_that_long_from_now():
    pool = Pool()
    pool.put(chain("a", 16))
    lease = pool.index.locate(1, chain("a", 16), 10.0)
    pool.now += 9
    assert pool.index.renew(1, lease.number, 20.0)
    pool.now += 19
    assert pool.put(chain("b", 1)) == bytes([KeyState.NO_ROOM])
    pool.now += 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])


def test_lease_is_not_renewed_beyond_the_maximum():
    pool = Pool()
    pool.put(chain("a", 1))
    lease = pool.index.locate(1, chain("a", 1), 10.0)
    assert pool.index.renew(1, lease.number, 1e9)
    pool.now += MAX_LEASE_S
    assert not pool.index.renew(1, lease.number, 1.0)


def test_lease_that_is_over_or_anothers_is_not_renewed():
    pool = Pool()
    pool.put(chain("a", 1))
    lease = pool.index.locate(1, chain("a", 1), 10.0)
    assert not pool.index.renew(2, lease.number, 10.0)
    pool.now += 10
    assert not pool.index.renew(1, lease.number, 10.0)  # whether or not expiry was noticed
    pool.index.expire()
    assert not pool.index.renew(1, lease.number, 10.0)
    released = pool.index.locate(1, chain("a", 1), 10.0)
    pool.index.release(1, released.number)
    assert not pool.index.renew(1, released.number, 10.0)


def test_block_named_twice_in_a_lease_is_free_once_it_is_released():
    pool = Pool(segments=1)
    keys = chain("a", 1)
    pool.put(keys, length=SEGMENT)
    lease = pool.index.locate(1, keys * 2, 10.0)
    assert lease.addresses == [BASE, BASE]
    pool.index.check_integrity()
    pool.index.release(1, lease.number)
    assert pool.put(chain("b", 1), length=SEGMENT) == bytes([KeyState.RESERVED])


def test_description_tells_parents_and_lengths_of_committed_blocks_only():
    pool = Pool()
    keys = chain("a", 2)
    pool.put(keys, length=5000)
    pending = chain("b", 1)
    pool.index.reserve(1, pending, [keys[1]], SLOT)
    description = pool.index.describe([*keys, *pending, *chain("c", 1)])
    assert description.parents == [NO_PARENT, keys[0], NO_PARENT, NO_PARENT]
    assert description.lengths == [5000, 5000, 0, 0]


def test_description_neither_leases_a_block_nor_keeps_it_fresh():
    pool = Pool()
    one, two = chain("one", 8), chain("two", 8)
    pool.put(one)
    pool.put(two)
    pool.index.describe(one)
    pool.put(chain("new", 8))
    assert pool.present(one) == [False] * 8


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


def test_slot_that_is_being_filled_is_kept_until_that_ends():
    pool = Pool()
    keys = chain("a", 16)
    reservation = pool.index.reserve(1, keys, [NO_PARENT, *keys[:-1]], SLOT)
    assert pool.index.fill(1, reservation.number) == (reservation.addresses, SLOT, RESERVATION_S)
    pool.now += RESERVATION_S + 1
    assert pool.put(chain("b", 1)) == bytes([KeyState.NO_ROOM])
    pool.index.give_up(1, reservation.number)
    assert pool.index.fill(1, reservation.number) is None
    assert pool.put(chain("b", 1)) == bytes([KeyState.RESERVED])
    assert pool.index.statistics().expired_reservations_total == 1


def test_threads_take_turns():
    """Each at what it may do to any block; the memory is small, so they evict each other's."""
    pool = Pool()
    names = [chain(name, 8) for name in "abcd"]
    failed: list[BaseException] = []

    def work(owner: int) -> None:
        dice = random.Random(owner)
        try:
            for _ in range(1500):
                keys = dice.choice(names)
                made = pool.index.reserve(owner, keys, [NO_PARENT, *keys[:-1]], SLOT)
                lease = pool.index.locate(owner, keys, 1.0)
                if made.number and pool.index.fill(owner, made.number) is not None:
                    count = made.states.count(KeyState.RESERVED)
                    pool.index.commit(owner, made.number, b"\1" * count, [owner] * count)
                pool.index.peek(keys)
                pool.index.report_corrupt(keys[-1:], lease.generations[-1:])
                pool.index.release(owner, lease.number)
                pool.index.expire()
        except BaseException as error:  # noqa: BLE001 # told by the test's thread
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(owner,)) for owner in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    pool.index.check_integrity()
    rest = pool.index.statistics()
    assert (rest.leases, rest.reservations, rest.leased_bytes) == (0, 0, 0)
    assert rest.evictions_total > 0


def test_aborted_slot_is_free_at_once():
    pool = Pool(segments=1)
    reservation = pool.index.reserve(1, chain("a", 1), [NO_PARENT], SEGMENT)
    pool.index.commit(1, reservation.number, b"\0", [0])
    assert pool.put(chain("b", 1), length=SEGMENT) == bytes([KeyState.RESERVED])


def test_any_byte_but_zero_in_a_mask_commits():
    pool = Pool()
    keys = chain("a", 4)
    reservation = pool.index.reserve(1, keys, [NO_PARENT, *keys[:-1]], SLOT)
    assert pool.index.commit(1, reservation.number, b"\2\xff\0\1", [5, 6, 7, 8]) == 3
    assert pool.present(keys) == [True, True, False, True]
    assert pool.index.locate(1, keys, 1.0).checksums == [5, 6, 0, 8]
    pool.index.check_integrity()


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


def test_slot_of_a_corrupt_block_waits_for_its_last_reader():
    pool = Pool(segments=1)
    keys = chain("a", 1)
    pool.put(keys, length=SEGMENT)
    first, last = (pool.index.locate(1, keys, 10.0) for _ in range(2))
    pool.index.report_corrupt(keys, first.generations)
    pool.index.release(1, first.number)
    assert pool.put(keys, length=SEGMENT) == bytes([KeyState.NO_ROOM])
    pool.index.release(1, last.number)
    assert pool.put(keys, length=SEGMENT) == bytes([KeyState.RESERVED])


def test_block_written_again_is_not_held_by_readers_of_its_corrupt_forerunner():
    pool = Pool(segments=2)
    keys = chain("a", 1)
    pool.put(keys, length=SEGMENT)
    old = pool.index.locate(1, keys, 10.0)
    pool.index.report_corrupt(keys, old.generations)
    pool.put(keys, length=SEGMENT)
    new = pool.index.locate(1, keys, 10.0)
    assert new.addresses != old.addresses
    assert new.generations != old.generations
    pool.index.release(1, old.number)
    assert pool.put(chain("b", 2), length=SEGMENT) == bytes([KeyState.RESERVED, KeyState.NO_ROOM])
    assert pool.present(keys) == [True]


def test_corrupt_head_that_is_written_again_is_continued_by_its_old_tail():
    pool = Pool()
    keys = chain("a", 2)
    pool.put(keys)
    lease = pool.index.locate(1, keys[:1], 1.0)
    pool.index.report_corrupt(keys[:1], lease.generations)
    pool.index.release(1, lease.number)
    pool.put(keys[:1])
    pool.put(chain("fill", 14))
    pool.use(keys[1:])
    pool.put(chain("new", 14))
    assert pool.present(keys) == [True, True]


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


def test_block_longer_than_a_segment_is_refused_with_one_warning(caplog: pytest.LogCaptureFixture):
    pool = Pool()
    for _ in range(3):
        assert pool.put(chain("a", 1), length=SEGMENT + 1) == bytes([KeyState.NO_ROOM])
        pool.index.expire()
    assert pool.index.refused() == {"too_long": 3}
    assert [record.message for record in caplog.records] == [
        "a block of 16385 B is longer than a segment of 16384 B and was refused; raise --segment"
    ]


@pytest.mark.parametrize("turnovers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_million_blocks_take_at_most_300_bytes_each(turnovers: int):
    """Chains and leaves, in processes of their own: what other tests left to the allocator would hide it."""
    command = [sys.executable, "-m", "tests.pool.index_memory", str(MILLION)]
    with (
        subprocess.Popen([*command, "200", str(turnovers)], stdout=subprocess.PIPE, text=True) as chains,
        subprocess.Popen([*command, "1", str(turnovers)], stdout=subprocess.PIPE, text=True) as leaves,
    ):
        results = [json.loads(process.communicate()[0]) for process in (chains, leaves)]
    for result in results:
        assert result["blocks"] >= MILLION - 128
        assert 80 < result["bytes_per_block"] <= 300
