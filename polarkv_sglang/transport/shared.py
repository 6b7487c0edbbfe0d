"""Memory that processes of one host share: a peer that may map it copies instead of asking UCX to."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import stat
from pathlib import Path

import msgspec

from polarkv_sglang.errors import TransportError

HUGE_PAGE_BYTES = 2 << 20
_PROT_NONE = 0  # mmap has no names for these
_MAP_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class SharedHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where a process on the same host, in the same PID namespace, finds a memfd."""

    pid: int
    fd: int  # in that process
    inode: int  # tells whether it is still the same memory: processes come and go under one pid
    length: int  # bytes
    boot_id: str  # of the host's kernel: no two hosts have the same
    pid_namespace: int


class AlignedMapping:
    """A memfd mapped from a multiple of HUGE_PAGE_BYTES on.

    Only so can the kernel map huge pages as such, where the memfd has them: then a client of a large slab
    needs no page table of 2 MB for each GiB, and no page fault for every 4 KiB that it touches first.
    """

    def __init__(self, fd: int, length: int, *, writable: bool = True) -> None:
        """Raises OSError if the address space or the memfd does not allow that."""
        self._reserved_length = length + HUGE_PAGE_BYTES
        self._reserved = _mmap(None, self._reserved_length, _PROT_NONE, _ANONYMOUS, -1)
        self.address = -(-self._reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES  # 0 once closed
        self.length = length  # bytes
        try:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            _mmap(self.address, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the mapping up; nothing may use its addresses any more."""
        if self.address:
            self.address = 0  # before another thread can come here
            _libc.munmap(self._reserved, self._reserved_length)


class Mapped(AlignedMapping):
    """A peer's shared memory, mapped here. It stays as it is when the peer dies, until close()."""

    def __init__(self, fd: int, length: int, remote: int, *, writable: bool = True) -> None:
        super().__init__(fd, length, writable=writable)
        self.remote = remote  # address in the peer


def share(fd: int, length: int) -> SharedHandle:
    """Describes the first `length` bytes of a memfd of this process to peers on its host.

    Seals it against shrinking: a peer would be killed (SIGBUS) on its next access. Raises TransportError if
    `fd` is not a memfd that allows that.
    """
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        status = os.fstat(fd)
    except OSError as error:
        raise TransportError(
            f"file descriptor {fd} cannot be shared ({error}); make it by memfd_create with MFD_ALLOW_SEALING"
        ) from error
    if length > status.st_size:
        raise TransportError(f"cannot share {length} bytes of a memfd of {status.st_size}")
    return SharedHandle(os.getpid(), fd, status.st_ino, length, _boot_id(), _pid_namespace())


def is_near(handle: SharedHandle) -> bool:
    """Whether who shares it is on this host and in this PID namespace."""
    return (handle.boot_id, handle.pid_namespace) == (_boot_id(), _pid_namespace())


def attach(handle: SharedHandle, remote_base: int, *, writable: bool = True) -> Mapped | None:
    """Maps what a peer shares, for reading or for both, which lies at `remote_base` in the peer.

    None if this process cannot: the peer is on another host, in another PID namespace, of another user or
    gone, or its handle does not name a memfd of that length that is sealed against shrinking.
    """
    if not is_near(handle):
        return None
    try:
        # Looked at before it is opened: to open a device or a pipe may already do something.
        path = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_PATH | os.O_CLOEXEC)
        try:
            if not _is_that_memfd(path, handle):
                return None
            fd = os.open(f"/proc/self/fd/{path}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        finally:
            os.close(path)
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                return None
            return Mapped(fd, handle.length, remote_base, writable=writable)
        finally:
            os.close(fd)
    except (OSError, ValueError, OverflowError):
        return None


def _is_that_memfd(path: int, handle: SharedHandle) -> bool:
    status = os.fstat(path)
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_ino == handle.inode
        and status.st_uid == os.geteuid()
        and status.st_size >= handle.length > 0
        and os.readlink(f"/proc/self/fd/{path}").startswith("/memfd:")
    )


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _mmap(address: int | None, length: int, protection: int, flags: int, fd: int) -> int:
    """mmap(2), which unlike Python's lets the address be chosen. Raises OSError."""
    found = _libc.mmap(address, length, protection, flags, fd, 0)
    if found == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    return int(found)
