"""Finds and opens libucp, XXH3, and the compiled helper that drives both without the GIL."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.helper import open_helper

MINIMUM_VERSION = (1, 17, 0)  # below it, peer error handling of RMA is not dependable

_SONAME = "libucp.so.0"
_HELPER = "polarkv_sglang.transport._batch"
_XXHASH_SONAME = "libxxhash.so.0"
_XXH3_OF_NOTHING = 0x2D06800538D394C2  # since xxHash 0.8; before, XXH3 was another function
_DECLARATIONS = """
uint64_t XXH3_64bits(const void *input, size_t length);
uint64_t XXH3_64bits_dispatch(const void *input, size_t length);

typedef struct { const char *file; void *base; const char *symbol; void *address; } Dl_info;
int dladdr(const void *address, Dl_info *info);
"""
_PROBE = f"""
import ctypes
version = [ctypes.c_uint() for _ in range(3)]
ctypes.CDLL("{_SONAME}").ucp_get_version(*map(ctypes.byref, version))
print(*(part.value for part in version))
"""

Source = Literal["explicit", "system", "wheel"]


@dataclass(frozen=True)
class Library:
    """One loaded libucp, and the hash that blocks are checked by."""

    path: str  # of the file that was really mapped
    source: Source
    version: tuple[int, int, int]
    ffi: FFI = field(repr=False)
    ucp: FFI.CData = field(repr=False)  # libucp's functions
    batch: FFI.CData = field(repr=False)  # the functions of our C files
    entry_points: FFI.CData = field(repr=False)  # `polar_ucp *`: what batch.c calls
    xxh3: FFI.CData = field(repr=False)  # `polar_hash`

    def describe(self, status: int) -> str:
        """UCX's words for a status, with its number."""
        return f"{self.ffi.string(self.ucp.ucs_status_string(status)).decode()} ({status})"

    def check(self, status: int, action: str) -> None:
        """Raises TransportError unless `status` is UCS_OK."""
        if status != 0:
            raise TransportError(f"UCX could not {action}: {self.describe(status)}")


@functools.cache
def load_library(path: str | None = None) -> Library:
    """Opens `path` if given, else the system's libucp.so.0 if recent enough, else that of the `libucx` wheel.

    RDMA needs the first or the second: the wheel is built without verbs. XXH3 comes from the `xxhash`
    package, else from the system. Raises TransportError, which names everything that was tried.
    """
    ffi = _declare()
    if path is not None:
        return _open(ffi, path, "explicit")
    version = probe_system()
    if isinstance(version, tuple):
        if version >= MINIMUM_VERSION:
            return _open(ffi, _SONAME, "system")
        version = f"version {_dotted(version)} is older than {_dotted(MINIMUM_VERSION)}"
    spec = importlib.util.find_spec("libucx")
    if spec is None or not spec.submodule_search_locations:
        raise TransportError(
            f"no usable libucp: system {_SONAME}: {version}; wheel: `libucx` is not installed; "
            "install libucx-cu13 or name a libucp.so"
        )
    return _open(ffi, str(Path(spec.submodule_search_locations[0], "lib", _SONAME)), "wheel")


def find_helper(ffi: FFI | None = None) -> tuple[str, FFI.CData]:
    """Where our compiled functions are, and these; raises as ``open_helper``."""
    return open_helper(ffi if ffi is not None else _declare(), _HELPER)


def probe_system() -> tuple[int, ...] | str:
    """The version of the system's libucp, or why there is none.

    Asked in another process: once opened here, an old one would lend its libucs to the wheel's libucp, which
    asks for it by the same name.
    """
    probe = [sys.executable, "-I", "-S", "-c", _PROBE]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be probed: {error}"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"the probe ended with {done.returncode}"])[-1]
    return tuple(int(part) for part in done.stdout.split())


def _declare() -> FFI:
    ffi = FFI()
    ffi.cdef(Path(__file__).with_name("abi.h").read_text())
    ffi.cdef(_DECLARATIONS)
    return ffi


def _open(ffi: FFI, name: str, source: Source) -> Library:
    _, batch = find_helper(ffi)
    try:
        ucp = ffi.dlopen(name, ffi.RTLD_NOW | ffi.RTLD_NODELETE)  # for good, as the helper
        parts = [ffi.new("unsigned *") for _ in range(3)]
        ucp.ucp_get_version(*parts)
    except (OSError, AttributeError) as error:
        raise TransportError(f"no usable libucp: {source} {name}: {error}") from error
    version = (parts[0][0], parts[1][0], parts[2][0])
    path = _file_of(ffi, ucp.ucp_get_version)
    if version < MINIMUM_VERSION:
        raise TransportError(
            f"{source} {path} is UCX {_dotted(version)}, not {_dotted(MINIMUM_VERSION)} or later"
        )
    # They come from one build, or another package of this process had opened its own UCX first.
    companion = _file_of(ffi, ucp.ucs_status_string)
    if Path(companion).resolve().parent != Path(path).resolve().parent:
        raise TransportError(f"{source} {path} got mixed with {companion}, which this process opened before")
    entry_points = ffi.new(
        "polar_ucp *",
        {
            "put": ucp.ucp_put_nbx,
            "get": ucp.ucp_get_nbx,
            "flush": ucp.ucp_ep_flush_nbx,
            "close": ucp.ucp_ep_close_nbx,
            "progress": ucp.ucp_worker_progress,
            "arm": ucp.ucp_worker_arm,
            "request_status": ucp.ucp_request_check_status,
            "request_free": ucp.ucp_request_free,
        },
    )
    return Library(path, source, version, ffi, ucp, batch, entry_points, _find_xxh3(ffi))


def _find_xxh3(ffi: FFI) -> FFI.CData:
    """XXH3_64bits as a C function, best the one that uses the widest vectors. Raises TransportError."""
    tried = []
    for name in (_extension_of_xxhash(), _XXHASH_SONAME):
        for symbol in ("XXH3_64bits_dispatch", "XXH3_64bits"):
            try:
                function = getattr(ffi.dlopen(name, ffi.RTLD_NOW | ffi.RTLD_NODELETE), symbol)
            except (OSError, AttributeError) as error:
                tried.append(str(error))
                continue
            if function(ffi.NULL, 0) == _XXH3_OF_NOTHING:
                return function
            tried.append(f"{symbol} of {name} is that of an xxHash before 0.8")
    raise TransportError(f"no usable XXH3 ({'; '.join(tried)}); install xxhash from PyPI or {_XXHASH_SONAME}")


def _extension_of_xxhash() -> str:
    try:
        spec = importlib.util.find_spec("xxhash._xxhash")
    except ImportError:
        spec = None
    return spec.origin if spec is not None and spec.origin is not None else "xxhash._xxhash"


def _file_of(ffi: FFI, function: FFI.CData) -> str:
    info = ffi.new("Dl_info *")
    if not ffi.dlopen(None).dladdr(ffi.cast("void *", function), info):
        raise TransportError("the dynamic loader does not know where libucp was mapped from")
    return str(ffi.string(info.file).decode())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
