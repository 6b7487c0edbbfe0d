"""Shared memory with the largest pages that the system gives."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path
from typing import Literal

from polarkv_sglang.transport import HUGE_PAGE_BYTES, AlignedMapping

# Python has no names for these two.
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_PAGE_BYTES = 4096

PageKind = Literal["hugetlb", "transparent", "4 KiB pages"]


class SharedMemory:
    """A memfd, mapped here, and sealed: nobody who has it can change its size and so make others fail."""

    def __init__(self, name: str, length: int, flags: int = 0) -> None:
        """Raises OSError, or ValueError for a length that cannot be mapped at all."""
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        try:
            os.ftruncate(self.fd, length)
            fcntl.fcntl(
                self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self._mapping = AlignedMapping(self.fd, length)
        except BaseException:
            os.close(self.fd)
            raise
        self.length = length
        self.address = self._mapping.address
        self.pages: PageKind = "4 KiB pages"

    def advise_huge_pages(self) -> None:
        """Ask for transparent huge pages; they come as memory is touched, where the kernel finds some."""
        advise_huge_pages(self.address, self.length)
        if _may_have_huge_pages(self.address):
            self.pages = "transparent"

    def prefault(self, stop: threading.Event, step_bytes: int) -> None:
        """Back all of it by pages, so much at a time, or until ``stop`` is set. Raises as ``populate``."""
        for start in range(0, self.length, step_bytes):
            if stop.is_set():
                return
            populate(self.address + start, min(step_bytes, self.length - start))

    def close(self) -> None:
        """Unmap it here; other mappings of it live on."""
        self._mapping.close()
        os.close(self.fd)


def map_shared(name: str, length: int) -> SharedMemory:
    """Memory of ``length`` bytes, in huge pages of the system's reserve if that has enough of them.

    Then the length is rounded down to whole huge pages. Raises OSError or ValueError.
    """
    huge_length = length // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if 0 < huge_length <= _reserved_huge_bytes() and (mapping := _map_huge(name, huge_length)) is not None:
        return mapping
    mapping = SharedMemory(name, length)
    mapping.advise_huge_pages()
    return mapping


def advise_huge_pages(address: int, length: int) -> None:
    """Ask for transparent huge pages where whole ones fit; nothing happens on a kernel without them."""
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + length) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end <= start:
        return
    try:
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def populate(address: int, length: int) -> None:
    """Back memory by physical pages; changes no content.

    Raises OSError where the kernel cannot: ENOMEM, or EINVAL before Linux 5.14.
    """
    _madvise(address, length, _MADV_POPULATE_WRITE)


def populate_huge(address: int, length: int) -> bool:
    """As ``populate``, in huge pages if the kernel can make some (True); ``address`` is a multiple of one.

    It can where the rules for shared memory do not give any by themselves. A process that maps the memfd,
    aligned too, then has 2 MiB of it by one page fault.
    """
    huge = True
    try:
        for start in range(0, length, HUGE_PAGE_BYTES):  # what holds nothing cannot be made huge
            populate(address + start, min(_PAGE_BYTES, length - start))
        _madvise(address, length // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, _MADV_COLLAPSE)
    except OSError:  # an older kernel, or no huge page left; or no memory, which the next line tells
        huge = False
    populate(address, length)
    return huge


def memory_bytes() -> int:
    """Memory and swap of this host."""
    with open("/proc/meminfo", encoding="utf-8") as file:
        fields = dict(line.split(":") for line in file)
    return sum(int(fields[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))


def _map_huge(name: str, length: int) -> SharedMemory | None:
    """Taken at once: a huge page that turns out not to be ours later kills whoever touches it, by SIGBUS.

    That is so where a control group or the NUMA policy grants fewer than the system has reserved.
    """
    try:
        mapping = SharedMemory(name, length, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError:
        return None
    try:
        populate(mapping.address, length)
    except OSError:
        mapping.close()
        return None
    mapping.pages = "hugetlb"
    return mapping


def _reserved_huge_bytes() -> int:
    """Huge pages of 2 MiB that were set aside on this host and that nobody has a claim on."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    try:
        free, claimed = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    except FileNotFoundError:
        return 0
    return (free - claimed) * HUGE_PAGE_BYTES


def _may_have_huge_pages(address: int) -> bool:
    """Whether the kernel's rules let the mapping at this address have transparent huge pages."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            name, *values = line.split()
            start, dash, end = name.partition("-")
            if dash:
                inside = int(start, 16) <= address < int(end, 16)
            elif inside and name == "THPeligible:":
                return values == ["1"]
    return False


def _madvise(address: int, length: int, advice: int) -> None:
    """madvise(2), which unlike Python's needs no mmap object, and gives the GIL up. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"madvise {advice} failed: {os.strerror(error)}")
