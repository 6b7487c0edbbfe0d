"""What a memory node holds: blocks by key, reservations of writers, leases of readers."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from enum import Enum
from typing import NamedTuple

import msgspec

from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.eviction import EvictionPolicy, LeastRecentlyUsed
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.messages import MAX_LEASE_S, KeyState

RESERVATION_S = 30.0
# Bounds the work of one request where blocks of another length must go until a segment is free; the next
# request carries on.
_MAX_SUGGESTIONS = 8192

_logger = logging.getLogger(__name__)


class _State(Enum):
    RESERVED = 0
    COMMITTED = 1
    DROPPED = 2  # out of the index, but leased: its slot is quarantined


class _Block(msgspec.Struct, gc=False, eq=False):
    """gc=False: holds no containers, and a million of these must not slow down the garbage collector."""

    key: bytes
    parent: bytes
    address: int
    length: int
    generation: int  # never given twice by one node, so equal means: nobody wrote here in between
    state: _State = _State.RESERVED
    checksum: int = 0
    leases: int = 0
    last_use: int = 0


class _Holding(NamedTuple):
    """A reservation or a lease."""

    owner: int
    deadline: float
    blocks: list[_Block]


class Reservation(NamedTuple):
    number: int  # 0: nothing was reserved
    addresses: list[int]  # one per key; 0 where not reserved
    states: bytes  # one KeyState per key


class Lease(NamedTuple):
    """Columns hold one number per key, 0 for a miss."""

    number: int  # 0: nothing was found
    addresses: list[int]
    lengths: list[int]
    checksums: list[int]
    generations: list[int]


class IndexStatistics(NamedTuple):
    """Fields are those of ``NodeStatistics``."""

    capacity_bytes: int
    used_bytes: int
    blocks: int
    reservations: int
    leases: int
    quarantined_blocks: int
    hits_total: int
    misses_total: int
    commits_total: int
    late_commits_total: int
    evictions_total: int
    corrupt_total: int
    expired_leases_total: int
    expired_reservations_total: int


class Index:
    """Blocks, who writes them and who reads them. Owned by one thread; no call waits for anything.

    ``owner`` is a connection: only the owner can end its reservations and leases. If it disappears they
    live on until they expire, since its transfers may still be under way.
    """

    def __init__(
        self,
        slab: Slab,
        policy: EvictionPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused: Counter[str] = Counter()  # keys, by reason
        self._slab = slab
        self._policy = policy if policy is not None else LeastRecentlyUsed()
        self._clock = clock
        self._blocks: dict[bytes, _Block] = {}  # reserved and committed
        # Blocks per parent, reserved ones included. The parent may be on another node, or not here yet.
        self._children: dict[bytes, int] = {}  # no entry for none
        self._reservations: dict[int, _Holding] = {}
        self._leases: dict[int, _Holding] = {}
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._tick = 0
        self._committed = self._quarantined = 0
        self._hits = self._misses = self._commits = self._late_commits = 0
        self._evictions = self._corrupt = self._expired_leases = self._expired_reservations = 0
        self._warned_too_long = False

    def reserve(
        self, owner: int, keys: Sequence[bytes], parents: Sequence[bytes], length: int
    ) -> Reservation:
        """Slots for new blocks of ``length`` bytes, for RESERVATION_S seconds; evicts where it must.

        Keys come in prefix order. Once one finds no room, later ones are not tried: without their head
        they would be useless.
        """
        addresses = [0] * len(keys)
        states = bytearray(len(keys))
        reserved: list[_Block] = []
        reason = None if self._slab.fits(length) else self._too_long(length)
        if not self._slab.has_room(length):
            self.expire()
        tick = self._advance(len(keys))
        with closing(self._policy.suggestions(self)) as suggestions:
            victims = itertools.islice(suggestions, _MAX_SUGGESTIONS)
            for position, (key, parent) in enumerate(zip(keys, parents, strict=True)):
                block = self._blocks.get(key)
                if block is not None:
                    block.last_use = tick - position
                    states[position] = KeyState.PRESENT if block.state is _State.COMMITTED else KeyState.BUSY
                    continue
                address = self._allocate(parent, length, victims) if reason is None else None
                if address is None:
                    reason = reason or "no_room"
                    self.refused[reason] += 1
                    states[position] = KeyState.NO_ROOM
                    continue
                block = _Block(key, parent, address, length, next(self._generations))
                self._blocks[key] = block
                reserved.append(block)
                addresses[position] = address
        if not reserved:
            return Reservation(0, addresses, bytes(states))
        number = next(self._numbers)
        self._reservations[number] = _Holding(owner, self._clock() + RESERVATION_S, reserved)
        return Reservation(number, addresses, bytes(states))

    def commit(self, owner: int, number: int, mask: bytes, checksums: Sequence[int]) -> int:
        """End a reservation: blocks whose mask is set become visible, the others' slots are free at once.

        Returns how many became visible: none if the reservation has expired. Raises ValueError if mask
        and checksums do not have one entry per reserved block.
        """
        reservation = self._reservations.get(number)
        if reservation is None or reservation.owner != owner:
            self._late_commits += len(mask) - mask.count(0)
            return 0
        if not len(mask) == len(checksums) == len(reservation.blocks):
            raise ValueError(f"{len(mask)} entries commit {len(reservation.blocks)} reserved blocks")
        del self._reservations[number]
        tick = self._advance(len(mask))
        count = 0
        for position, block in enumerate(reservation.blocks):
            if not mask[position]:
                self._abort(block)
                continue
            block.state = _State.COMMITTED
            block.checksum = checksums[position]
            block.last_use = tick - position
            count += 1
            if block.key not in self._children:
                self._policy.add_leaf(block.key, block.last_use)
        self._committed += count
        self._commits += count
        return count

    def locate(self, owner: int, keys: Sequence[bytes], lease_s: float) -> Lease:
        """Find committed blocks and keep their slots for ``lease_s`` seconds (MAX_LEASE_S at most)."""
        blocks, committed = self._blocks, _State.COMMITTED
        tick = self._advance(len(keys))
        found: list[_Block] = []
        addresses, lengths, checksums, generations = ([0] * len(keys) for _ in range(4))
        for position, key in enumerate(keys):
            block = blocks.get(key)
            if block is None or block.state is not committed:
                continue
            block.leases += 1
            block.last_use = tick - position  # heads fresher than tails
            addresses[position] = block.address
            lengths[position] = block.length
            checksums[position] = block.checksum
            generations[position] = block.generation
            found.append(block)
        self._hits += len(found)
        self._misses += len(keys) - len(found)
        if not found:
            return Lease(0, addresses, lengths, checksums, generations)
        number = next(self._numbers)
        self._leases[number] = _Holding(owner, self._clock() + min(lease_s, MAX_LEASE_S), found)
        return Lease(number, addresses, lengths, checksums, generations)

    def release(self, owner: int, number: int) -> None:
        """End a lease; harmless if it has expired."""
        lease = self._leases.get(number)
        if lease is not None and lease.owner == owner:
            self._end_lease(number)

    def report_corrupt(self, keys: Sequence[bytes], generations: Sequence[int]) -> None:
        """Drop blocks that are still of that generation; a slot is reused once no lease is on it."""
        for key, generation in zip(keys, generations, strict=True):
            block = self._blocks.get(key)
            if block is None or block.state is not _State.COMMITTED or block.generation != generation:
                continue
            self._corrupt += 1
            self._forget(block)
            if block.leases:
                block.state = _State.DROPPED
                self._quarantined += 1
            else:
                self._slab.free(block.address)

    def peek(self, keys: Sequence[bytes]) -> bytes:
        """One byte per key: 1 for a committed block. Neither touches nor leases."""
        blocks, committed = self._blocks, _State.COMMITTED
        return bytes((block := blocks.get(key)) is not None and block.state is committed for key in keys)

    def expire(self) -> None:
        """End the leases and reservations whose time is over."""
        now = self._clock()
        for number in [number for number, lease in self._leases.items() if lease.deadline <= now]:
            self._expired_leases += 1
            self._end_lease(number)
        for number in [number for number, held in self._reservations.items() if held.deadline <= now]:
            self._expired_reservations += 1
            for block in self._reservations.pop(number).blocks:
                self._abort(block)

    def leaf_last_use(self, key: bytes) -> int | None:
        """See ``Leaves``."""
        block = self._blocks.get(key)
        if block is None or block.state is not _State.COMMITTED or key in self._children:
            return None
        return block.last_use

    def statistics(self) -> IndexStatistics:
        """Sizes now and counters since the start."""
        return IndexStatistics(
            capacity_bytes=self._slab.capacity_bytes,
            used_bytes=self._slab.used_bytes,
            blocks=self._committed,
            reservations=len(self._reservations),
            leases=len(self._leases),
            quarantined_blocks=self._quarantined,
            hits_total=self._hits,
            misses_total=self._misses,
            commits_total=self._commits,
            late_commits_total=self._late_commits,
            evictions_total=self._evictions,
            corrupt_total=self._corrupt,
            expired_leases_total=self._expired_leases,
            expired_reservations_total=self._expired_reservations,
        )

    def check_integrity(self) -> None:
        """PolarError if blocks, holdings, children and slab do not agree. For tests: takes O(n)."""
        leases = Counter(block for lease in self._leases.values() for block in lease.blocks)
        quarantined = [block for block in leases if self._blocks.get(block.key) is not block]
        reserved = {block.key for held in self._reservations.values() for block in held.blocks}
        held_blocks = [*self._blocks.values(), *quarantined]
        for key, block in self._blocks.items():
            _require(block.key == key and block.state is not _State.DROPPED, "a block is misplaced")
            _require((block.state is _State.RESERVED) == (key in reserved), "a reservation is lost")
        _require(all(block.state is _State.DROPPED for block in quarantined), "a leased block is lost")
        _require(all(block.leases == leases[block] for block in held_blocks), "leases are miscounted")
        children = Counter(b.parent for b in self._blocks.values() if b.parent != NO_PARENT)
        _require(children == self._children, "children are miscounted")
        committed = sum(block.state is _State.COMMITTED for block in self._blocks.values())
        _require(committed == self._committed, "committed blocks are miscounted")
        _require(len(quarantined) == self._quarantined, "quarantined blocks are miscounted")
        with closing(self._policy.suggestions(self)) as suggestions:
            leaves = {key for key in self._blocks if self.leaf_last_use(key) is not None}
            _require(set(suggestions) == leaves, "the policy does not know every leaf")
        self._slab.check_integrity((block.address, block.length) for block in held_blocks)

    def _advance(self, ticks: int) -> int:
        self._tick += ticks
        return self._tick

    def _too_long(self, length: int) -> str:
        if not self._warned_too_long:
            self._warned_too_long = True
            _logger.warning(
                "a block of %d B is longer than a segment of %d B and was refused; raise --segment",
                length,
                self._slab.segment_bytes,
            )
        return "too_long"

    def _allocate(self, parent: bytes, length: int, victims: Iterator[bytes]) -> int | None:
        """A slot for a block that continues ``parent``, which is not evicted for it; None: no room."""
        if parent != NO_PARENT:
            self._children[parent] = self._children.get(parent, 0) + 1
        address = self._slab.allocate(length)
        while address is None and (victim := next(victims, None)) is not None:
            if self._evict(victim):
                address = self._slab.allocate(length)
        if address is None:
            self._leave(parent)
        return address

    def _evict(self, key: bytes) -> bool:
        """Evict a block, unless it is being written, read or continued."""
        block = self._blocks.get(key)
        if block is None or block.state is not _State.COMMITTED or block.leases or key in self._children:
            return False
        self._forget(block)
        self._slab.free(block.address)
        self._evictions += 1
        return True

    def _forget(self, block: _Block) -> None:
        """Take a committed block out of the index; its slot is the caller's to free."""
        del self._blocks[block.key]
        self._committed -= 1
        self._leave(block.parent)

    def _abort(self, block: _Block) -> None:
        """Undo the reservation of one block."""
        del self._blocks[block.key]
        self._leave(block.parent)
        self._slab.free(block.address)

    def _leave(self, parent: bytes) -> None:
        """A block that continued ``parent`` is gone."""
        if parent == NO_PARENT:
            return
        count = self._children.pop(parent)
        if count > 1:
            self._children[parent] = count - 1
            return
        last_use = self.leaf_last_use(parent)
        if last_use is not None:
            self._policy.add_leaf(parent, last_use)

    def _end_lease(self, number: int) -> None:
        for block in self._leases.pop(number).blocks:
            block.leases -= 1
            if block.state is _State.DROPPED and not block.leases:
                self._quarantined -= 1
                self._slab.free(block.address)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PolarError(f"the index is inconsistent: {text}")
