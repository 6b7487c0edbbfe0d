"""What readers keep from being evicted, for a while."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from polarkv_sglang.pool.table import BlockTable, Rows
from polarkv_sglang.transport.messages import MAX_LEASE_S

MOST_ROWS = 1 << 21  # that the leases of one owner have in all: bounds what the node remembers for it
_LEASE_ROWS = 32  # a lease itself takes about as much memory as so many rows


class _Lease(NamedTuple):
    owner: int
    deadline: float
    rows: Rows
    waiting: bool  # nobody reads its blocks yet

    @property
    def size(self) -> int:
        return _LEASE_ROWS + self.rows.size


class Leases:
    """Leases on rows of a block table, by number. Whose they are and how long they last; see ``Index``."""

    def __init__(self, table: BlockTable, clock: Callable[[], float]) -> None:
        self.leased_bytes = 0  # of blocks that have a lease, each once
        self.expired_total = 0
        self._table = table
        self._clock = clock
        self._leases: dict[int, _Lease] = {}
        self._rows: Counter[int] = Counter()  # by owner
        self._waiting: dict[int, set[int]] = {}  # numbers of leases, by owner
        self._numbers = itertools.count(1)

    def begin(self, owner: int, rows: Rows, lease_s: float, most_bytes: float | None = None) -> int:
        """The number of a new lease; 0 for no rows, or if its owner's leases would then have above MOST_ROWS.

        With ``most_bytes`` it is one of a request that waits, and 0 if all leases would then keep above that.
        """
        lease = _Lease(owner, self._deadline(lease_s), rows, most_bytes is not None)
        if not rows.size or self._rows[owner] + lease.size > MOST_ROWS:
            return 0
        self.leased_bytes += self._table.lease(rows)
        if most_bytes is not None and self.leased_bytes > most_bytes:
            self.leased_bytes -= self._table.release(rows)
            return 0
        number = next(self._numbers)
        self._leases[number] = lease
        self._rows[owner] += lease.size
        if lease.waiting:
            self._waiting.setdefault(owner, set()).add(number)
        return number

    def renew(self, owner: int, number: int, lease_s: float) -> bool:
        """Let a lease end ``lease_s`` seconds from now; False if it is over already."""
        lease = self._leases.get(number)
        if lease is None or lease.owner != owner or lease.deadline <= self._clock():
            return False
        self._leases[number] = lease._replace(deadline=self._deadline(lease_s))
        return True

    def end(self, owner: int, number: int) -> Rows | None:
        """The rows of a lease that is over now; None if it was before, or is another's."""
        lease = self._leases.get(number)
        return self._end(number) if lease is not None and lease.owner == owner else None

    def end_waiting(self, owner: int) -> list[Rows]:
        """The rows of an owner's leases for requests that wait; they are over now."""
        return [self._end(number) for number in tuple(self._waiting.get(owner, ()))]

    def expire(self) -> list[Rows]:
        """End the leases whose time is over."""
        now = self._clock()
        over = [number for number, lease in self._leases.items() if lease.deadline <= now]
        self.expired_total += len(over)
        return [self._end(number) for number in over]

    def by_row(self) -> Counter[int]:
        """How many leases each row has. For tests: takes O(n)."""
        return Counter(row for lease in self._leases.values() for row in lease.rows.tolist())

    def __len__(self) -> int:
        return len(self._leases)

    def _end(self, number: int) -> Rows:
        lease = self._leases.pop(number)
        self.leased_bytes -= self._table.release(lease.rows)
        self._rows[lease.owner] -= lease.size
        if not self._rows[lease.owner]:
            del self._rows[lease.owner]
        if lease.waiting:
            self._waiting[lease.owner].discard(number)
            if not self._waiting[lease.owner]:
                del self._waiting[lease.owner]
        return lease.rows

    def _deadline(self, lease_s: float) -> float:
        return self._clock() + min(lease_s, MAX_LEASE_S)
