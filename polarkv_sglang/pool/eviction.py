"""Which block goes next. A policy suggests; the index evicts, and may refuse what is in use."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Protocol


class Leaves(Protocol):
    """What a policy may ask of the index. A leaf is a committed block that no other continues.

    Blocks go by their row in the index. A row may get another block once its own is gone, but no two blocks
    share a last use, and each use is later than all that were told before it.
    """

    def leaf_last_use(self, row: int) -> int:
        """Tick of a leaf's last use; 0 if there is no leaf in that row (any more)."""
        ...

    def oldest_leaves(self, after: int, count: int) -> list[tuple[int, int]]:
        """Last use and row of the first ``count`` leaves used after a tick, in order; takes O(blocks)."""
        ...


class EvictionPolicy(Protocol):
    """Decides the order of eviction."""

    def add_leaf(self, row: int, last_use: int) -> None:
        """A committed block has no successors (any more); said again whenever that comes true."""
        ...

    def suggestions(self, leaves: Leaves) -> Generator[int]:
        """Rows to evict, best first, until closed; what is suggested and not evicted must come up again.

        Leaves may be added while the generator is open. A tail goes before its head, since the loss
        of a head makes its tail useless: only leaves may be suggested.
        """
        ...


class LeastRecentlyUsed:
    """The leaf that was used the longest time ago.

    Keeps a heap of the oldest leaves only, all of those up to a horizon, and moves the horizon on when
    they are used up. So neither a use nor a leaf beyond the horizon costs anything here, and the look
    through all blocks is shared by the ``batch`` evictions that follow it.
    Does not help against a scan: long prompts that never come back push out everything older.
    """

    def __init__(self, batch: int = 32768) -> None:
        self._batch = batch
        self._horizon = 0  # every leaf that was last used by this tick is in the heap
        self._heap: list[tuple[int, int]] = []  # last use, row
        self._queued: set[int] = set()  # rows in the heap

    def add_leaf(self, row: int, last_use: int) -> None:
        if last_use <= self._horizon and row not in self._queued:
            self._queued.add(row)
            heapq.heappush(self._heap, (last_use, row))

    def suggestions(self, leaves: Leaves) -> Generator[int]:
        suggested: list[int] = []
        try:
            while self._heap or self._advance(leaves):
                last_use, row = heapq.heappop(self._heap)
                self._queued.discard(row)
                # A leaf that was used meanwhile has moved beyond the horizon.
                if leaves.leaf_last_use(row) == last_use:
                    suggested.append(row)
                    yield row
        finally:
            for row in suggested:
                last_use = leaves.leaf_last_use(row)
                if last_use:
                    self.add_leaf(row, last_use)

    def _advance(self, leaves: Leaves) -> bool:
        """Fill the empty heap from beyond the horizon; whether there was anything."""
        self._heap = leaves.oldest_leaves(self._horizon, self._batch)  # in order, and so a heap
        self._queued = {row for _, row in self._heap}
        if self._heap:
            self._horizon = self._heap[-1][0]
        return bool(self._heap)
