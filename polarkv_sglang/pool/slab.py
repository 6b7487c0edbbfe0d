"""The memory that a node lends: one shared mapping."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.pages import SharedMemory, map_shared, memory_bytes, populate_huge
from polarkv_sglang.transport import HUGE_PAGE_BYTES
from polarkv_sglang.transport.directory import ENTRY_BYTES

PAGE_BYTES = 4096  # slots start at and are multiples of this
_DEFAULT_SEGMENT_BYTES = 64 << 20
_BYTES_AN_ENTRY = 32 << 10


def default_segment_bytes(capacity_bytes: int) -> int:
    """A sixteenth of the capacity in whole huge pages, at least one of them, at most 64 MiB."""
    sixteenth = capacity_bytes // 16 // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    return max(HUGE_PAGE_BYTES, min(_DEFAULT_SEGMENT_BYTES, sixteenth))


class SlabMemory:
    """Memory at a fixed address, to be registered with UCX. Not touched until it is used.

    It is a memfd, so that readers and writers on this host can map it too, by ``fd``. Sealed: nobody can
    change its size, and so make those who have it mapped fail.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ConfigError if the system has or grants less than that."""
        available_bytes = memory_bytes()
        if capacity_bytes > available_bytes:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} is more than the memory and swap of this host, "
                f"{format_bytes(available_bytes)}; give less"
            )
        try:
            self._mapped = map_shared("polarkv-slab", capacity_bytes)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} cannot be mapped ({error}); give less"
            ) from error
        self.fd = self._mapped.fd  # closed by ``close``
        self.pages = self._mapped.pages
        self.capacity_bytes = self._mapped.length  # less than was asked for by the part of a huge page
        self.base_address = self._mapped.address

    def prefault(self, stop: threading.Event, step_bytes: int = _DEFAULT_SEGMENT_BYTES) -> None:
        """Back all of it by physical pages, or until ``stop`` is set; changes no content.

        May run beside readers and writers. Raises OSError where the kernel cannot: ENOMEM, or EINVAL before
        Linux 5.14.
        """
        huge = True
        for start in range(0, self.capacity_bytes, step_bytes):
            if stop.is_set():
                return
            huge &= populate_huge(self.base_address + start, min(step_bytes, self.capacity_bytes - start))
        if huge and self.pages == "4 KiB pages":
            self.pages = "transparent"

    def close(self) -> None:
        """Give the memory back; nothing here may read or write it any more. Other mappings of it live on."""
        self._mapped.close()


def make_directory(capacity_bytes: int) -> SharedMemory:
    """Room to tell readers on this host where blocks of a slab lie: an entry for each 32 KiB of it.

    Of shorter blocks it has some only. Raises ConfigError.
    """
    entries = max(1, capacity_bytes // _BYTES_AN_ENTRY)
    try:
        return SharedMemory("polarkv-directory", -(-entries * ENTRY_BYTES // PAGE_BYTES) * PAGE_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no memory for a directory of {entries} blocks ({error}); give less") from error


@dataclass(frozen=True)
class Slab:
    """Memory that blocks lie in, cut into segments; slab.c hands out slots in them."""

    base_address: int
    memory_bytes: int
    segment_bytes: int  # no block can be longer

    def __post_init__(self) -> None:
        """Raises ConfigError if no segment fits or segments are not whole pages."""
        if self.segment_bytes < PAGE_BYTES or self.segment_bytes % PAGE_BYTES:
            raise ConfigError(f"segment {self.segment_bytes} B is not a positive multiple of {PAGE_BYTES} B")
        if self.memory_bytes < self.segment_bytes:
            raise ConfigError(
                f"capacity {format_bytes(self.memory_bytes)} is below one segment of "
                f"{format_bytes(self.segment_bytes)}; raise --capacity or lower --segment"
            )

    @property
    def capacity_bytes(self) -> int:
        """Of whole segments."""
        return self.memory_bytes // self.segment_bytes * self.segment_bytes
