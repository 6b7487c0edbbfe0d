"""What is looked for in the pool for one prompt, and what of it has arrived."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from polarkv_sglang.blend.arena import Arena
from polarkv_sglang.blend.rolling import Tokens
from polarkv_sglang.blend.sightings import Naming
from polarkv_sglang.weights import WeightsIdentity


class Gap(NamedTuple):
    """Tokens [start, end) of a prompt that no donor in this engine has."""

    start: int
    end: int


class Arrived(NamedTuple):
    """Tokens [start, end) of a prompt, whose KV for other positions is here."""

    start: int
    end: int
    old_start: int  # position of the first one in the prompt that the KV was computed in
    first_page: int  # in that prompt, of rows[0]
    rows: list[int]  # of the arena, a page each


class Wanted(NamedTuple):
    """What is looked for, and the names of everything in that search."""

    tokens: Tokens
    gaps: Sequence[Gap]
    naming: Naming
    block_digest: bytes  # of the namespace of this rank's blocks
    weights: WeightsIdentity


class Search:
    """One prompt's search. Made by ``TextFinder.start``; ended by the scheduler's thread, by ``close``.

    Its methods take locks: no finalizer may call them, for it can run inside of any of them.
    """

    def __init__(self, wanted: Wanted, arena: Arena, timeout_s: float) -> None:
        self.wanted = wanted
        self.overdue_at = time.monotonic() + timeout_s
        self._arena = arena
        self._found: list[Arrived] = []
        self._closed = False
        self._lock = threading.Lock()
        self._done = threading.Event()

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._done.is_set() or time.monotonic() >= self.overdue_at

    def freeze(self) -> None:
        """What has not arrived by now counts as not found."""
        if not self._done.is_set():
            self.close()

    @property
    def found(self) -> list[Arrived]:
        """What has arrived, ascending; nothing until all has, or once it is closed."""
        return self._found if self._done.is_set() and not self._closed else []

    def digest(self) -> int:
        """63 bits that are equal for equal finds: ranks compare them before they use one."""
        text = repr([each[:4] for each in self.found]).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def close(self) -> None:
        """What was found is not needed any more; what still comes neither."""
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed and self._done.is_set():
                self._give_back()

    def finish(self, found: list[Arrived]) -> None:
        """For the searching thread, which writes to no row after this."""
        with self._lock:
            self._found = found
            self._done.set()
            if self._closed:
                self._give_back()

    def _give_back(self) -> None:
        for each in self._found:
            self._arena.give_back(each.rows)
        self._found = []
