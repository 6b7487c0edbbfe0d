"""The host: memory, limits, and whether processes on it can share memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from polarkv_sglang.config import format_bytes
from polarkv_sglang.doctor.findings import Facts, Finding
from polarkv_sglang.pool.embedded import default_capacity_bytes, memory_limits

_LEAST_MEMORY_BYTES = 1 << 30
_LEAST_OPEN_FILES = 4096
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_SECRET = b"polarkv same host"
# A process that another one of its user reads from, as a client does from a memory node. The call is
# prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY), which UCX makes too.
_CHILD = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
shared = os.memfd_create("polarkv-doctor")
os.write(shared, {_SECRET!r})
private = ctypes.create_string_buffer({_SECRET!r})
print(shared, ctypes.addressof(private), flush=True)
sys.stdin.read()
"""


def check_memory(facts: Facts) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    # A control group without a limit may have an absurdly high one.
    limit = min((limit for limit in memory_limits() if limit < memory.total), default=None)
    room = memory.available if limit is None else min(memory.available, limit)
    group = "no control group limit" if limit is None else f"control group limit {format_bytes(limit)}"
    text = (
        f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available, {group}; "
        f"an embedded node would lend {format_bytes(default_capacity_bytes())}"
    )
    details = {"available_bytes": memory.available, "total_bytes": memory.total, "limit_bytes": limit}
    if room < _LEAST_MEMORY_BYTES:
        mend = (
            f"free memory or raise the limit: a memory node here has room for less than {format_bytes(room)}"
        )
        yield Finding("memory", "warning", text, mend, details)
    else:
        yield Finding("memory", "ok", text, details=details)


def check_huge_pages(facts: Facts) -> Iterator[Finding]:
    private, shared = (_chosen(_HUGE_PAGES / name) for name in ("enabled", "shmem_enabled"))
    reserved, free = _reserved_huge_pages()
    text = (
        f"transparent for private memory: {private or 'not in this kernel'}, for shared memory: "
        f"{shared or 'not in this kernel'}; reserved (hugetlb): {reserved}, {free} free"
    )
    details = {"private": private, "shared": shared, "reserved_pages": reserved, "free_pages": free}
    if private in ("always", "madvise"):
        yield Finding("huge pages", "ok", text, details=details)
    else:
        yield Finding(
            "huge pages",
            "warning",
            text,
            f"echo madvise > {_HUGE_PAGES / 'enabled'}: host pools are touched and registered faster",
            details,
        )


def check_open_files(facts: Facts) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"at most {_spell_limit(soft)} open files (hard limit {_spell_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_OPEN_FILES:
        yield Finding(
            "open files",
            "warning",
            text,
            "ulimit -n 65536, or LimitNOFILE=65536 in the service: a node has several for each rank",
            {"soft": soft, "hard": hard},
        )
    else:
        yield Finding("open files", "ok", text, details={"soft": soft, "hard": hard})


def check_same_host(facts: Facts) -> Iterator[Finding]:
    """Whether a client can map a memory node's slab, and whether UCX could read it by CMA."""
    child = [sys.executable, "-I", "-S", "-c", _CHILD]
    with subprocess.Popen(
        child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            descriptor, address = map(int, process.stdout.readline().split())
            unmapped = _why_not_mapped(process.pid, descriptor)
            unread = _why_not_read(process.pid, address)
        finally:
            process.kill()
    scope = _PTRACE_SCOPE.read_text(encoding="ascii").strip() if _PTRACE_SCOPE.exists() else None
    details = {"mapped": unmapped is None, "cma": unread is None, "ptrace_scope": scope}
    yama = f" (kernel.yama.ptrace_scope is {scope})" if scope is not None else ""
    if unmapped is not None:
        yield Finding(
            "same host",
            "warning",
            f"memory of another process cannot be mapped: {unmapped}; CMA {unread or 'works'}{yama}",
            "let processes of one user open /proc/<pid>/fd of each other (mount option hidepid, seccomp and "
            "PID namespaces forbid it); until then the pool here goes as between hosts",
            details,
        )
    elif unread is not None:
        text = (
            f"memory of another process can be mapped; CMA is not permitted: {unread}{yama}, and not needed"
        )
        yield Finding("same host", "ok", text, details=details)
    else:
        yield Finding(
            "same host", "ok", "memory of another process can be mapped; CMA works", details=details
        )


def _why_not_mapped(pid: int, descriptor: int) -> str | None:
    try:
        with (
            open(f"/proc/{pid}/fd/{descriptor}", "r+b") as file,
            mmap.mmap(file.fileno(), len(_SECRET)) as mapping,
        ):
            return None if mapping[:] == _SECRET else "it shows other bytes"
    except OSError as error:
        return error.strerror or str(error)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _why_not_read(pid: int, address: int) -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(len(_SECRET))
    local = _Iovec(ctypes.cast(buffer, ctypes.c_void_p), len(_SECRET))
    remote = _Iovec(address, len(_SECRET))
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    count = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count < 0:
        return os.strerror(ctypes.get_errno())
    return None if buffer.raw == _SECRET else "it shows other bytes"


def _chosen(path: Path) -> str | None:
    """The value in brackets of a file such as ``always [madvise] never``."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def _reserved_huge_pages() -> tuple[int, int]:
    """Reserved huge pages of the default size, and how many of them are free."""
    counts = {"HugePages_Total": 0, "HugePages_Free": 0}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in counts:
            counts[name] = int(value)
    return counts["HugePages_Total"], counts["HugePages_Free"]


def _spell_limit(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
