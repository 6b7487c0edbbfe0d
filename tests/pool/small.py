"""A small index, with a clock of its own."""

from __future__ import annotations

from typing import Any

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.messages import KeyState
from tests.pool.listed import ListedIndex

BASE = 1 << 40
SEGMENT = 4 * 4096
SLOT = 4096


class Pool:
    """An index on four segments of four slots, with a clock of its own."""

    def __init__(
        self, segments: int = 4, *, segment_bytes: int = SEGMENT, checked: bool = True, **limits: Any
    ) -> None:
        self.now = 100.0
        self.checked = checked  # after each step, which takes long if there are many blocks
        slab = Slab(BASE, segments * segment_bytes, segment_bytes)
        self.index = ListedIndex(slab, clock=lambda: self.now, **limits)

    def put(self, keys: list[bytes], *, head: bytes = NO_PARENT, length: int = SLOT) -> bytes:
        """Reserve and commit a chain; the states."""
        reservation = self.index.reserve(1, keys, [head, *keys[:-1]], length)
        count = reservation.states.count(KeyState.RESERVED)
        if count:
            assert self.index.commit(1, reservation.number, b"\1" * count, list(range(count))) == count
        if self.checked:
            self.index.check_integrity()
        return reservation.states

    def fill(self, count: int, length: int) -> list[bytes]:
        """Put chains of so many blocks until there are ``count``; all keys."""
        keys = [number.to_bytes(16, "big") for number in range(1, count + 1)]
        for start in range(0, count, length):
            for at in range(start, start + length, 8192):
                part = keys[at : min(at + 8192, start + length)]
                self.put(part, head=keys[at - 1] if at > start else NO_PARENT)
        return keys

    def use(self, keys: list[bytes]) -> None:
        self.index.release(1, self.index.locate(1, keys, 1.0).number)

    def present(self, keys: list[bytes]) -> list[bool]:
        return [flag == 1 for flag in self.index.peek(keys)]


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{position:03}".encode().ljust(16) for position in range(length)]
