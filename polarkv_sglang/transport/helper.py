"""Finds and opens compiled functions of this package."""

from __future__ import annotations

import importlib.util

from cffi import FFI

from polarkv_sglang.errors import TransportError


def open_helper(ffi: FFI, module: str) -> tuple[str, FFI.CData]:
    """Where a module's compiled functions are, and these; ``ffi`` has the declarations of its abi.h.

    Raises TransportError if they were not built, or of another abi.h than that which was declared.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise TransportError(f"{module} is not built; install the package again, with a C compiler at hand")
    try:
        # For good: an unload as the interpreter ends would pull the code from under threads of UCX.
        helper = ffi.dlopen(spec.origin, ffi.RTLD_NOW | ffi.RTLD_NODELETE)
    except OSError as error:
        raise TransportError(f"{module} cannot be opened: {error}") from error
    try:
        fits = helper.polar_abi() == helper.POLAR_ABI
    except AttributeError:
        fits = False
    if not fits:
        raise TransportError(
            f"{spec.origin} was built of another abi.h; install the package again, with a C compiler at hand"
        )
    return spec.origin, helper
