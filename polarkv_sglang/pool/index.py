"""What a memory node holds: blocks by key, reservations of writers, leases of readers."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.eviction import EvictionPolicy, LeastRecentlyUsed
from polarkv_sglang.pool.leases import Leases
from polarkv_sglang.pool.slab import Slab, slot_bytes_of
from polarkv_sglang.pool.table import BlockTable, Rows
from polarkv_sglang.transport.messages import KeyState

RESERVATION_S = 30.0
# Of a slab, what leases may keep when a request that only waits asks for one more: the rest is room for what
# is written and read now.
MOST_HELD = 0.5
# Bounds the work of one request where blocks of another length must go until a segment is free; the next
# request carries on.
_MAX_SUGGESTIONS = 8192

_logger = logging.getLogger(__name__)

# As plain numbers: a member of an enum takes a microsecond to look up.
_PRESENT, _NO_ROOM, _BUSY = int(KeyState.PRESENT), int(KeyState.NO_ROOM), int(KeyState.BUSY)

_NO_ROWS = np.empty(0, np.intp)

_MethodT = TypeVar("_MethodT", bound=Callable[..., Any])


class _Writing(NamedTuple):
    """A reservation."""

    owner: int
    deadline: float
    keys: list[bytes]
    rows: Rows
    filled: bool = False  # a thread of ours writes to its slots: it must not end before the thread does


class Reservation(NamedTuple):
    number: int  # 0: nothing was reserved
    addresses: list[int]  # one per key; 0 where not reserved
    states: bytes  # one KeyState per key


class Slots(NamedTuple):
    """Those of a reservation that is being filled."""

    addresses: list[int]
    length: int  # bytes of each block
    left_s: float  # until the reservation should have been committed


class Lease(NamedTuple):
    """Columns hold one number per key, 0 for a miss."""

    number: int  # 0: nothing was found
    addresses: list[int]
    lengths: list[int]
    checksums: list[int]
    generations: list[int]


class Hold(NamedTuple):
    number: int  # 0: nothing is kept
    present: bytes  # one byte per key: 1 for a committed block


class Description(NamedTuple):
    """Columns hold one entry per key; for a miss NO_PARENT and 0."""

    parents: list[bytes]
    lengths: list[int]


class IndexStatistics(NamedTuple):
    """Fields are those of ``NodeStatistics``."""

    capacity_bytes: int
    used_bytes: int
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


def _alone(method: _MethodT) -> _MethodT:
    """Let one thread at a time into the index."""

    @functools.wraps(method)
    def call(self: Index, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_MethodT, call)


class Index:
    """Blocks, who writes them and who reads them. For any thread; no call waits for anything but another.

    ``owner`` is a connection: only the owner can end its reservations and leases. If it disappears they
    live on until they expire, since its transfers may still be under way. Its holds have none, and what a
    thread of ours reads or fills for it ends with the thread.
    """

    def __init__(
        self,
        slab: Slab,
        policy: EvictionPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._slab = slab
        self._policy = policy if policy is not None else LeastRecentlyUsed()
        self._clock = clock
        self._table = BlockTable(slab.max_slots)
        # Rows by key. Only what is committed can be found by a reader.
        self._committed: dict[bytes, int] = {}
        self._reserved: dict[bytes, int] = {}
        self._quarantined: set[int] = set()  # rows of blocks that were dropped, but are leased
        # How many blocks continue a block that is not here: it is on another node, or not here yet.
        self._absent: dict[bytes, int] = {}
        self._reservations: dict[int, _Writing] = {}
        self._leases = Leases(self._table, clock)
        self._numbers = itertools.count(1)
        self._generation = 1  # of the next block
        self._tick = 0
        self._hits = self._misses = self._commits = self._late_commits = 0
        self._evictions = self._corrupt = self._expired_reservations = 0
        self._warned_too_long = False

    @_alone
    def reserve(
        self,
        owner: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        length: int,
        *,
        fill: bool = False,
    ) -> Reservation:
        """Slots for new blocks of ``length`` bytes, for RESERVATION_S seconds; evicts where it must.

        With ``fill`` they are being filled from the start, see there.

        Keys come in prefix order. Once one finds no room, later ones get none: without their head they would
        be useless. Where nothing else is left, what is told to be present may go for what is new.
        """
        addresses = [0] * len(keys)
        states = bytearray(len(keys))
        if not self._slab.has_room(length):
            self._expire()
        # Before any eviction: a policy that has looked at the leaves relies on later uses having later ticks.
        self._table.use(self._rows(keys), self._advance(len(keys)))
        new: dict[bytes, int] = {}  # position, by key
        again: list[int] = []  # positions of keys that are named once more
        for position, key in enumerate(keys):
            if key in self._committed:
                states[position] = _PRESENT
            elif key in self._reserved:
                states[position] = _BUSY
            elif key in new:
                again.append(position)
            else:
                new[key] = position
        if not new:
            return Reservation(0, addresses, bytes(states))
        added, positions = list(new), list(new.values())
        rows, slots = self._add(added, [parents[position] for position in positions], length)
        for position, address in zip(positions, slots):
            addresses[position] = address
        for position in positions[len(slots) :]:
            states[position] = _NO_ROOM
        for position in again:
            states[position] = _BUSY if addresses[new[keys[position]]] else _NO_ROOM
        if _NO_ROOM in states:
            reason = "no_room" if self._slab.fits(length) else self._too_long(length)
            self._refused[reason] += states.count(_NO_ROOM)
        if not slots:
            return Reservation(0, addresses, bytes(states))
        number = next(self._numbers)
        deadline = self._clock() + RESERVATION_S
        self._reservations[number] = _Writing(owner, deadline, added[: len(slots)], rows, fill)
        return Reservation(number, addresses, bytes(states))

    @_alone
    def commit(self, owner: int, number: int, mask: bytes, checksums: Sequence[int]) -> int:
        """End a reservation: blocks whose mask is set become visible, the others' slots are free at once.

        Returns how many became visible: none if the reservation has expired. Raises ValueError if mask
        and checksums do not have one entry per reserved block.
        """
        reservation = self._reservations.get(number)
        if reservation is None or reservation.owner != owner:
            self._late_commits += len(mask) - mask.count(0)
            return 0
        if not len(mask) == len(checksums) == len(reservation.rows):
            raise ValueError(f"{len(mask)} entries commit {len(reservation.rows)} reserved blocks")
        del self._reservations[number]
        chosen = np.frombuffer(mask, np.uint8) != 0
        ticks = np.arange(tick := self._advance(len(mask)), tick - len(mask), -1, dtype=np.uint64)
        keys, rows = reservation.keys, reservation.rows
        if not chosen.all():
            self._abort(list(itertools.compress(keys, ~chosen)), rows[~chosen])
            keys, checksums = list(itertools.compress(keys, mask)), list(itertools.compress(checksums, mask))
            rows, ticks = rows[chosen], ticks[chosen]
        for key in keys:
            del self._reserved[key]
        self._committed.update(zip(keys, rows.tolist()))
        if keys:
            for row in self._table.commit(rows, checksums, ticks).tolist():
                self._policy.add_leaf(row, self._table.last_uses[row])
        self._commits += len(keys)
        return len(keys)

    @_alone
    def fill(self, owner: int, number: int) -> Slots | None:
        """The slots of a reservation, which lasts from now on until it is committed; None if it is over.

        For a thread of this process that writes to them: whoever comes late must find them as they were.
        """
        held = self._reservations.get(number)
        if held is None or held.owner != owner:
            return None
        self._reservations[number] = held._replace(filled=True)
        places = self._table.places(held.rows)
        return Slots(places.addresses, places.lengths[0], held.deadline - self._clock())

    @_alone
    def give_up(self, owner: int, number: int) -> None:
        """Free the slots of a reservation that nobody writes to any more; if it is late, it has expired."""
        held = self._reservations.get(number)
        if held is None or held.owner != owner:
            return
        self._expired_reservations += held.deadline <= self._clock()
        del self._reservations[number]
        self._abort(held.keys, held.rows)

    @_alone
    def locate(self, owner: int, keys: Sequence[bytes], lease_s: float, *, counted: bool = True) -> Lease:
        """Find committed blocks and keep their slots for ``lease_s`` seconds (MAX_LEASE_S at most).

        Not ``counted`` are those who read further parts of what they have begun to read. Nothing is found by
        an owner that has as many leases as it may.
        """
        table = self._table
        rows = self._rows(keys)
        found = rows[rows > 0]
        if counted:
            table.use(rows, self._advance(len(keys)))  # heads fresher than tails
            self._hits += found.size
            self._misses += rows.size - found.size
        number = self._leases.begin(owner, found, lease_s)
        return Lease(number, *table.places(rows if number else np.zeros_like(rows)))

    @_alone
    def hold(self, owner: int, keys: Sequence[bytes], lease_s: float) -> Hold:
        """As ``peek``, and keep what is there for ``lease_s`` seconds (MAX_LEASE_S at most); not touched.

        For whom a read is still to come. Nothing is kept if leases would then have more than MOST_HELD of the
        slab: requests that wait must not keep out those that write.
        """
        rows = self._rows(keys)
        most_bytes = MOST_HELD * self._slab.capacity_bytes
        number = self._leases.begin(owner, rows[rows > 0], lease_s, most_bytes)
        return Hold(number, (rows > 0).tobytes())

    @_alone
    def renew(self, owner: int, number: int, lease_s: float) -> bool:
        """Let a lease end ``lease_s`` seconds from now (MAX_LEASE_S at most); False if it is over already."""
        return self._leases.renew(owner, number, lease_s)

    @_alone
    def release(self, owner: int, number: int) -> None:
        """End a lease; harmless if it has expired."""
        rows = self._leases.end(owner, number)
        if rows is not None:
            self._free_quarantined(rows)

    @_alone
    def end_holds(self, owner: int) -> None:
        """End the leases of an owner that is gone, as far as nobody reads under them."""
        for rows in self._leases.end_waiting(owner):
            self._free_quarantined(rows)

    @_alone
    def report_corrupt(self, keys: Sequence[bytes], generations: Sequence[int]) -> None:
        """Drop blocks that are still of that generation; a slot is reused once no lease is on it."""
        for key, generation in zip(keys, generations, strict=True):
            row = self._committed.get(key, 0)
            if not row or self._table.generations[row] != generation:
                continue
            self._corrupt += 1
            self._forget(row)
            if self._table.leases[row]:
                self._quarantined.add(row)
            else:
                self._free([row])

    @_alone
    def peek(self, keys: Sequence[bytes]) -> bytes:
        """One byte per key: 1 for a committed block. Neither touches nor leases."""
        return bytes(map(self._committed.__contains__, keys))

    @_alone
    def describe(self, keys: Sequence[bytes]) -> Description:
        """What committed blocks continue and how long they are. Neither touches nor leases."""
        rows = self._rows(keys)
        parents = [self._table.parents[row] for row in rows.tolist()]
        return Description(parents, self._table.places(rows).lengths)

    @_alone
    def expire(self) -> None:
        """End the leases and reservations whose time is over."""
        self._expire()

    def leaf_last_use(self, row: int) -> int:
        """See ``Leaves``."""
        return 0 if self._table.children[row] else self._table.last_uses[row]

    def oldest_leaves(self, after: int, count: int) -> list[tuple[int, int]]:
        """See ``Leaves``."""
        return self._table.oldest_leaves(after, count)

    @_alone
    def refused(self) -> Counter[str]:
        """Keys that were refused, by reason."""
        return self._refused.copy()

    @_alone
    def statistics(self) -> IndexStatistics:
        """Sizes now and counters since the start."""
        return IndexStatistics(
            capacity_bytes=self._slab.capacity_bytes,
            used_bytes=self._slab.used_bytes,
            blocks=len(self._committed),
            reservations=len(self._reservations),
            leases=len(self._leases),
            leased_bytes=self._leases.leased_bytes,
            quarantined_blocks=len(self._quarantined),
            hits_total=self._hits,
            misses_total=self._misses,
            commits_total=self._commits,
            late_commits_total=self._late_commits,
            evictions_total=self._evictions,
            corrupt_total=self._corrupt,
            expired_leases_total=self._leases.expired_total,
            expired_reservations_total=self._expired_reservations,
        )

    @_alone
    def check_integrity(self) -> None:
        """PolarError if blocks, holdings, children, policy and slab do not agree. For tests: takes O(n)."""
        table = self._table
        committed, quarantined = self._committed.values(), self._quarantined
        reserved = [row for held in self._reservations.values() for row in held.rows.tolist()]
        in_use = [*committed, *reserved, *quarantined]
        table.check_integrity(in_use)
        rows = self._committed | self._reserved
        _require(all(table.keys[row] == key for key, row in rows.items()), "a block has another's row")
        _require(sorted(reserved) == sorted(self._reserved.values()), "a reservation is lost")
        _require(all(table.last_uses[row] for row in committed), "a committed block was never used")
        _require(
            not any(table.last_uses[row] for row in [*reserved, *quarantined]), "a hidden block can be read"
        )
        generations = {table.generations[row] for row in in_use}
        _require(len(generations) == len(in_use) and 0 not in generations, "two blocks share a generation")
        leases = self._leases.by_row()
        _require(all(table.leases[row] == leases[row] for row in in_use), "leases are miscounted")
        _require(leases.keys() <= {*committed, *quarantined}, "a leased block is lost")
        leased_bytes = sum(table.lengths[row] for row in leases)
        _require(self._leases.leased_bytes == leased_bytes, "the leased bytes are miscounted")
        _require(all(leases[row] for row in quarantined), "a dropped block keeps its slot")
        children = Counter(table.parents[row] for row in rows.values())
        del children[NO_PARENT]
        here = {key: table.children[row] for key, row in rows.items() if table.children[row]}
        _require(children == here | self._absent, "children are miscounted")
        _require(not self._absent.keys() & rows.keys(), "a block is here and absent")
        _require(not any(table.children[row] for row in quarantined), "a dropped block is continued")
        leaves = {row for row in committed if self.leaf_last_use(row)}
        # A copy, so that the check brings nothing in order that was not.
        with closing(copy.deepcopy(self._policy).suggestions(self)) as suggestions:
            _require(set(suggestions) == leaves, "the policy does not know every leaf")
        self._slab.check_integrity((table.addresses[row], table.lengths[row]) for row in in_use)

    def _expire(self) -> None:
        now = self._clock()
        for rows in self._leases.expire():
            self._free_quarantined(rows)
        for number, held in list(self._reservations.items()):
            if held.deadline <= now and not held.filled:
                self._expired_reservations += 1
                del self._reservations[number]
                self._abort(held.keys, held.rows)

    def _rows(self, keys: Sequence[bytes]) -> Rows:
        """The row of each committed block, 0 for a miss."""
        return np.fromiter(map(self._committed.get, keys, itertools.repeat(0)), np.intp, len(keys))

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

    def _add(self, keys: list[bytes], parents: list[bytes], length: int) -> tuple[Rows, list[int]]:
        """Rows and slots of newly reserved blocks, of the leading ones that there is room for."""
        for parent in parents:  # before anything is evicted for their blocks
            self._join(parent)
        slots = self._slab.allocate(length, len(keys))
        if len(slots) < len(keys) and self._slab.fits(length):
            with closing(self._policy.suggestions(self)) as suggestions:
                victims = itertools.islice(suggestions, _MAX_SUGGESTIONS)
                while missing := len(keys) - len(slots):
                    # Not more at a time: a segment that gets free may be all that was missing.
                    wanted_bytes = min(missing * slot_bytes_of(length), self._slab.segment_bytes)
                    if not self._evict(wanted_bytes, victims):
                        break
                    slots += self._slab.allocate(length, missing)
        count = len(slots)
        for parent in parents[count:]:
            self._leave(parent)
        if not count:
            return _NO_ROWS, slots
        children = [self._absent.pop(key, 0) for key in keys[:count]]
        rows = self._table.add(keys[:count], parents[:count], slots, length, self._generation, children)
        self._generation += count
        self._reserved.update(zip(keys, rows.tolist()))
        return rows, slots

    def _evict(self, wanted_bytes: int, victims: Iterator[int]) -> bool:
        """Evict blocks of so many bytes that nobody writes, reads or continues; False if there are none."""
        rows = []
        for row in victims:
            if not self.leaf_last_use(row) or self._table.leases[row]:
                continue
            self._forget(row)
            rows.append(row)
            wanted_bytes -= slot_bytes_of(self._table.lengths[row])
            if wanted_bytes <= 0:
                break
        self._free(rows)
        self._evictions += len(rows)
        return bool(rows)

    def _forget(self, row: int) -> None:
        """Let nobody find a committed block any more; its slot is the caller's to free."""
        del self._committed[self._table.keys[row]]
        self._table.last_uses[row] = 0
        self._unlink(row)

    def _abort(self, keys: Sequence[bytes], rows: Rows) -> None:
        """Undo the reservation of blocks."""
        for key, row in zip(keys, rows.tolist()):
            del self._reserved[key]
            self._unlink(row)
        self._free(rows.tolist())

    def _free(self, rows: Sequence[int]) -> None:
        """Give the slots and the rows of unlinked blocks to others."""
        for row in rows:
            self._slab.free(self._table.addresses[row])
        if rows:
            self._table.discard(np.array(rows, np.intp))

    def _unlink(self, row: int) -> None:
        """Take a block from between its parent and its children."""
        table = self._table
        if table.children[row]:
            self._absent[table.keys[row]] = table.children[row]
            table.children[row] = 0
        self._leave(table.parents[row])

    def _join(self, parent: bytes) -> None:
        """A block will continue ``parent``."""
        if parent == NO_PARENT:
            return
        if row := self._committed.get(parent, 0) or self._reserved.get(parent, 0):
            self._table.children[row] += 1
        else:
            self._absent[parent] = self._absent.get(parent, 0) + 1

    def _leave(self, parent: bytes) -> None:
        """A block that continued ``parent`` is gone."""
        if parent == NO_PARENT:
            return
        if row := self._committed.get(parent, 0) or self._reserved.get(parent, 0):
            self._table.children[row] -= 1
            last_use = self.leaf_last_use(row)
            if last_use:
                self._policy.add_leaf(row, last_use)
            return
        count = self._absent.pop(parent)
        if count > 1:
            self._absent[parent] = count - 1

    def _free_quarantined(self, rows: Rows) -> None:
        """Of rows that a lease was on, give slots of dropped blocks to others."""
        if self._quarantined:
            for row in self._quarantined.intersection(rows.tolist()):
                if not self._table.leases[row]:
                    self._quarantined.remove(row)
                    self._free([row])


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PolarError(f"the index is inconsistent: {text}")
