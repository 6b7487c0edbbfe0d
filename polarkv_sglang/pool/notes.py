"""Notes of a memory node: small values by key, kept beside its blocks and apart from their memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

_ENTRY_BYTES = 256  # of a key, a value's header and their places, in Python's memory
_SHARE = 64  # of the node's capacity, one part
_MOST_BYTES = 64 << 20


def notes_bytes(capacity_bytes: int) -> int:
    """What the notes of a node may take that lends so much: a 64th of it, 64 MiB at most."""
    return min(_MOST_BYTES, capacity_bytes // _SHARE)


class Notes:
    """Notes within ``capacity_bytes``, least recently used first out. The last one under a key counts.

    They say where something is, and may be wrong by now: who reads one has to look. For any thread.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._notes: OrderedDict[bytes, bytes] = OrderedDict()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._notes)

    def write(self, keys: Sequence[bytes], notes: Sequence[bytes]) -> None:
        """Keep a note for each key."""
        with self._lock:
            for key, note in zip(keys, notes, strict=True):
                self._drop(key)
                self._notes[key] = note
                self.used_bytes += _ENTRY_BYTES + len(note)
            while self.used_bytes > self._capacity_bytes:
                self._drop(next(iter(self._notes)))

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """The note of each key, empty where there is none; those that are read count as used."""
        found = []
        with self._lock:
            for key in keys:
                note = self._notes.get(key, b"")
                if note:
                    self._notes.move_to_end(key)
                found.append(note)
        return found

    def _drop(self, key: bytes) -> None:
        note = self._notes.pop(key, None)
        if note is not None:
            self.used_bytes -= _ENTRY_BYTES + len(note)
