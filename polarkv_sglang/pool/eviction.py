"""Which block goes next. A policy suggests; the index evicts, and may refuse what is in use."""

from __future__ import annotations

import heapq
from collections.abc import Generator
from typing import Protocol


class Leaves(Protocol):
    """What a policy may ask of the index."""

    def leaf_last_use(self, key: bytes) -> int | None:
        """Tick of a committed block's last use; None if it is gone or other blocks continue it."""
        ...


class EvictionPolicy(Protocol):
    """Decides the order of eviction."""

    def add_leaf(self, key: bytes, last_use: int) -> None:
        """A committed block has no successors (any more); said again whenever that comes true."""
        ...

    def suggestions(self, leaves: Leaves) -> Generator[bytes]:
        """Keys to evict, best first, until closed; what is suggested and not evicted must come up again.

        Leaves may be added while the generator is open. A tail goes before its head, since the loss
        of a head makes its tail useless: only leaves may be suggested.
        """
        ...


class LeastRecentlyUsed:
    """The leaf that was used the longest time ago.

    One heap entry per leaf, brought up to date only when it surfaces, so that a use costs nothing here.
    Does not help against a scan: long prompts that never come back push out everything older.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, bytes]] = []
        self._queued: set[bytes] = set()  # keys in the heap

    def add_leaf(self, key: bytes, last_use: int) -> None:
        if key not in self._queued:
            self._queued.add(key)
            heapq.heappush(self._heap, (last_use, key))

    def suggestions(self, leaves: Leaves) -> Generator[bytes]:
        suggested: list[bytes] = []
        try:
            while self._heap:
                queued_use, key = heapq.heappop(self._heap)
                self._queued.discard(key)
                last_use = leaves.leaf_last_use(key)
                if last_use is None:
                    continue
                if last_use > queued_use:
                    self.add_leaf(key, last_use)
                    continue
                suggested.append(key)
                yield key
        finally:
            for key in suggested:
                last_use = leaves.leaf_last_use(key)
                if last_use is not None:
                    self.add_leaf(key, last_use)
