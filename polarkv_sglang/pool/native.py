"""The memory node's compiled functions, which abi.h declares."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

from polarkv_sglang.transport.helper import open_helper

_HELPER = "polarkv_sglang.pool._node"


class Native(NamedTuple):
    path: str  # of the file that has them
    node: FFI.CData  # the functions
    ffi: FFI


@functools.cache
def load_native() -> Native:
    """Raises TransportError as ``open_helper``."""
    ffi = FFI()
    ffi.cdef(Path(__file__).with_name("abi.h").read_text())
    return Native(*open_helper(ffi, _HELPER), ffi)
