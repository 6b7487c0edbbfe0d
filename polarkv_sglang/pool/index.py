"""What a memory node holds: blocks by key, reservations of writers, leases of readers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from cffi import FFI

from polarkv_sglang.errors import ConfigError, PolarError
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.directory import ENTRY_BYTES as DIRECTORY_ENTRY_BYTES
from polarkv_sglang.transport.directory import RING_BYTES
from polarkv_sglang.transport.messages import MAX_GRANTED, MAX_KEYS, MAX_LEASE_S, RESERVATION_S

# Of a slab, what leases may keep when a request that only waits asks for one more: the rest is room for what
# is written and read now.
MOST_HELD = 0.5
MOST_LEASED_ROWS = 1 << 21  # in the leases of one owner, in all: bounds what the node remembers for it
EVICTION_BATCH = 32768
_MOST_GRANTED_BYTES = 64 << 20
_MOST_GRANTED = 1 / 64  # of a slab
_MOST_GRANTED_IN_ALL = 1 / 8  # engines of many ranks use one node

_NS = 1_000_000_000
_BYTES, _WORDS = "uint8_t[]", "uint64_t[]"

_logger = logging.getLogger(__name__)


class Reservation(NamedTuple):
    number: int  # 0: nothing was reserved
    addresses: bytes  # u64, one per key; 0 where not reserved
    states: bytes  # one KeyState per key


class Lease(NamedTuple):
    """Columns hold one u64 per key, 0 for a miss."""

    number: int  # 0: nothing was found
    addresses: bytes
    lengths: bytes
    checksums: bytes
    generations: bytes


class Hold(NamedTuple):
    number: int  # 0: nothing is kept
    present: bytes  # one byte per key: 1 for a committed block


class Description(NamedTuple):
    """Columns hold one entry per key; for a miss NO_PARENT and 0."""

    parents: bytes  # keys, end to end
    lengths: bytes  # u64


class IndexStatistics(NamedTuple):
    """Fields are those of ``NodeStatistics``."""

    capacity_bytes: int
    used_bytes: int
    granted_bytes: int
    blocks: int
    reservations: int
    leases: int
    leased_bytes: int
    quarantined_blocks: int
    hits_total: int
    misses_total: int
    commits_total: int
    late_commits_total: int
    evictions_total: int
    corrupt_total: int
    expired_leases_total: int
    expired_reservations_total: int
    sent_blocks_total: int
    sent_bytes_total: int


class Index:
    """Blocks, who writes them and who reads them; index.c does the work. For any thread.

    Keys are given end to end; ValueError for more than MAX_KEYS of them. ``owner`` is a connection: only the
    owner can end its reservations and leases. If it disappears they live on until they expire, since its
    transfers may still be under way. Its holds have none, and what a stream reads or writes for it ends with
    the stream.
    """

    def __init__(
        self,
        slab: Slab,
        *,
        directory: SharedMemory | None = None,
        most_leased_rows: int = MOST_LEASED_ROWS,
        eviction_batch: int = EVICTION_BATCH,
        most_granted: int | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``directory``: where readers on this host find committed blocks; blank, and lives as long as this.
        ``eviction_batch``: how many leaves are put in order at a time. ``most_granted``: bytes that one owner
        may have ahead, by default a 64th of the slab or 64 MiB. Raises ConfigError if the slab has more
        blocks than an index can tell apart, or there is no memory for it."""
        if most_granted is None:
            most_granted = min(_MOST_GRANTED_BYTES, int(_MOST_GRANTED * slab.capacity_bytes))
        self.most_granted_bytes = most_granted
        _, self._node, self._ffi = load_native()
        self._segment_bytes = slab.segment_bytes
        self._clock_ns = clock_ns
        self._warned_too_long = False
        settings = self._ffi.new(
            "polar_index_settings *",
            {
                "base": slab.base_address,
                "capacity_bytes": slab.capacity_bytes,
                "segment_bytes": slab.segment_bytes,
                "reservation_ns": int(RESERVATION_S * _NS),
                "longest_lease_ns": int(MAX_LEASE_S * _NS),
                "most_leased_rows": most_leased_rows,
                "most_held_bytes": int(MOST_HELD * slab.capacity_bytes),
                "most_granted_bytes": self.most_granted_bytes,
                "most_granted_in_all_bytes": max(
                    most_granted, int(_MOST_GRANTED_IN_ALL * slab.capacity_bytes)
                ),
                "eviction_batch": eviction_batch,
                "directory": 0 if directory is None else directory.address,
                "directory_entries": 0 if directory is None else directory.length // DIRECTORY_ENTRY_BYTES,
            },
        )
        index = self._node.polar_index_new(settings)
        if index == self._ffi.NULL:
            raise ConfigError(f"there is no memory for the index of {slab.capacity_bytes} B; give less")
        self.native = self._ffi.gc(index, self._node.polar_index_free)

    def reserve(self, owner: int, keys: bytes, parents: bytes, length: int) -> Reservation:
        """Slots for new blocks of ``length`` bytes, for RESERVATION_S seconds; evicts where it must.

        Keys come in prefix order. Once one finds no room, later ones get none: without their head they would
        be useless. Where little else is left, or the length is another than that of most blocks, what is told
        to be present may go for what is new.
        """
        count = _count(keys, parents)
        addresses, states = bytearray(8 * count), bytearray(count)
        number = self._node.polar_reserve(
            self.native, owner, self._of(keys), self._of(parents), count, length, False, self._clock_ns(),
            self._words(addresses), self._of(states),
        )  # fmt: skip
        return Reservation(number, bytes(addresses), bytes(states))

    def commit(self, owner: int, number: int, mask: bytes, checksums: bytes) -> int:
        """End a reservation: blocks whose mask is set become visible, the others' slots are free at once.

        Returns how many became visible: none if the reservation has expired. Raises ValueError if mask
        and checksums (u64) do not have one entry per reserved block.
        """
        if len(checksums) != 8 * len(mask):
            raise ValueError(f"{len(mask)} entries and {len(checksums)} bytes of checksums")
        count: int = self._node.polar_commit(
            self.native, owner, number, self._of(mask), self._words(checksums), len(mask)
        )
        if count < 0:
            raise ValueError(f"{len(mask)} entries commit {-count} reserved blocks")
        return count

    def open_ring(self, owner: int, ring: SharedMemory) -> None:
        """Hear what is told in ``ring``, see ring.h, before blocks are looked up; ``close_ring`` ends that.

        Raises MemoryError, or ValueError for memory of another size.
        """
        if ring.length != RING_BYTES:
            raise ValueError(f"{ring.length} bytes are no ring of {RING_BYTES}")
        if not self._node.polar_open_ring(self.native, owner, ring.address):
            raise MemoryError("there is no memory for a ring")

    def close_ring(self, owner: int) -> None:
        """Hear what is left, and touch the owner's ring no more; harmless if it has none.

        Slots that it has ahead stay so until their time is over.
        """
        self._node.polar_close_ring(self.native, owner)

    def grant(self, owner: int, length: int, slots: int) -> bytes:
        """Addresses (u64) of slots for blocks of ``length`` bytes that the owner will tell of in its ring.

        As many as it asks for, MAX_GRANTED at most; none without a ring, for more than
        ``most_granted_bytes``, if owners have an eighth of the slab ahead, or if there is no room, or was
        none for somebody within RESERVATION_S. They are the owner's for RESERVATION_S seconds, or until the
        next call for it. Evicts where it must.
        """
        addresses = bytearray(8 * min(slots, MAX_GRANTED))
        count = self._node.polar_grant(
            self.native, owner, length, len(addresses) // 8, self._clock_ns(), self._words(addresses)
        )
        return bytes(addresses[: 8 * count])

    def locate(self, owner: int, keys: bytes, lease_s: float, *, counted: bool = True) -> Lease:
        """Find committed blocks and keep their slots for ``lease_s`` seconds (MAX_LEASE_S at most).

        Not ``counted`` are those who read further parts of what they have begun to read. Nothing is found by
        an owner that has as many leases as it may.
        """
        count = _count(keys)
        columns = [bytearray(8 * count) for _ in range(4)]
        places = self._ffi.new("polar_places *", [self._words(column) for column in columns])
        number = self._node.polar_locate(
            self.native, owner, self._of(keys), count, _lease_ns(lease_s), counted, self._clock_ns(), places
        )
        return Lease(number, *map(bytes, columns))

    def hold(self, owner: int, keys: bytes, lease_s: float) -> Hold:
        """As ``peek``, and keep what is there for ``lease_s`` seconds (MAX_LEASE_S at most); not touched.

        For whom a read is still to come. Nothing is kept if leases would then have more than MOST_HELD of the
        slab: requests that wait must not keep out those that write.
        """
        count = _count(keys)
        present = bytearray(count)
        number = self._node.polar_hold(
            self.native, owner, self._of(keys), count, _lease_ns(lease_s), self._clock_ns(), self._of(present)
        )
        return Hold(number, bytes(present))

    def use(self, keys: bytes) -> None:
        """Count a read of blocks that the reader found in the directory, as ``locate`` does."""
        self._node.polar_use(self.native, self._of(keys), _count(keys))

    def renew(self, owner: int, number: int, lease_s: float) -> bool:
        """Let a lease end ``lease_s`` seconds from now (MAX_LEASE_S at most); False if it is over already."""
        return bool(self._node.polar_renew(self.native, owner, number, _lease_ns(lease_s), self._clock_ns()))

    def release(self, owner: int, number: int) -> None:
        """End a lease; harmless if it has expired."""
        self._node.polar_release(self.native, owner, number)

    def end_holds(self, owner: int) -> None:
        """End the leases of an owner that is gone, as far as nobody reads under them."""
        self._node.polar_end_holds(self.native, owner)

    def report_corrupt(self, keys: bytes, generations: bytes) -> None:
        """Drop blocks that are still of that generation (u64); a slot is reused once no lease is on it."""
        count = _count(keys)
        if len(generations) != 8 * count:
            raise ValueError(f"{count} keys and {len(generations)} bytes of generations")
        self._node.polar_report_corrupt(self.native, self._of(keys), self._words(generations), count)

    def peek(self, keys: bytes) -> bytes:
        """One byte per key: 1 for a committed block. Neither touches nor leases."""
        present = bytearray(_count(keys))
        self._node.polar_peek(self.native, self._of(keys), len(present), self._of(present))
        return bytes(present)

    def describe(self, keys: bytes) -> Description:
        """What committed blocks continue and how long they are. Neither touches nor leases."""
        count = _count(keys)
        parents, lengths = bytearray(len(keys)), bytearray(8 * count)
        self._node.polar_describe(self.native, self._of(keys), count, self._of(parents), self._words(lengths))
        return Description(bytes(parents), bytes(lengths))

    def expire(self) -> None:
        """End the leases and reservations whose time is over; warn once of blocks that are too long."""
        self._node.polar_expire(self.native, self._clock_ns())
        longest = self._counted().longest
        if longest and not self._warned_too_long:
            self._warned_too_long = True
            _logger.warning(
                "a block of %d B is longer than a segment of %d B and was refused; raise --segment",
                longest,
                self._segment_bytes,
            )

    def refused(self) -> Counter[str]:
        """Keys that were refused, by reason."""
        counted = self._counted()
        return +Counter(no_room=counted.no_room, too_long=counted.too_long)

    def statistics(self) -> IndexStatistics:
        """Sizes now and counters since the start."""
        counted = self._counted()
        return IndexStatistics(
            *(getattr(counted, field.removesuffix("_total")) for field in IndexStatistics._fields)
        )

    def check_integrity(self) -> None:
        """PolarError if blocks, holdings, children, policy and slab do not agree. For tests: takes long."""
        wrong = self._node.polar_check(self.native)
        if wrong != self._ffi.NULL:
            raise PolarError(f"the index is inconsistent: {self._ffi.string(wrong).decode()}")

    def _counted(self) -> FFI.CData:  # a polar_index_statistics
        counted = self._ffi.new("polar_index_statistics *")
        self._node.polar_statistics(self.native, counted)
        return counted

    def _of(self, data: bytes | bytearray) -> FFI.CData:
        return self._ffi.from_buffer(_BYTES, data)

    def _words(self, data: bytes | bytearray) -> FFI.CData:
        return self._ffi.from_buffer(_WORDS, data)


def _count(keys: bytes, parents: bytes | None = None) -> int:
    """How many keys there are; each has a parent, if there are any."""
    count, rest = divmod(len(keys), KEY_BYTES)
    if rest or count > MAX_KEYS or len(keys if parents is None else parents) != len(keys):
        raise ValueError(f"{len(keys)} bytes are not up to {MAX_KEYS} keys, or have other parents")
    return count


def _lease_ns(lease_s: float) -> int:
    return int(min(lease_s, MAX_LEASE_S) * _NS)
