"""A UCX context and the memory registered with it."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.library import Library

if TYPE_CHECKING:
    from polarkv_sglang.transport.worker import Worker

_FEATURE_RMA, _FEATURE_WAKEUP = 1 << 1, 1 << 4
_PARAM_FEATURES, _PARAM_MT_WORKERS_SHARED = 1 << 0, 1 << 5
_LOOPBACK = "lo"
_SHARED_MEMORY = frozenset({"all", "shm", "sm", "posix"})
_MEM_MAP_ADDRESS, _MEM_MAP_LENGTH, _MEM_MAP_MEMORY_TYPE = 1 << 0, 1 << 1, 1 << 4
_ATTR_MEMORY_TYPES = 1 << 2
_MEMORY_CUDA = 1  # UCX's number for it


class RegisteredMemory:
    """Memory that UCX may read and write: the caller keeps it mapped and has touched every page.

    ``cuda``: it is a GPU's; the context must take such memory.
    """

    def __init__(self, context: Context, address: int, length: int, *, cuda: bool = False) -> None:
        library = context.library
        ffi = library.ffi
        params = ffi.new("ucp_mem_map_params_t *")
        params.field_mask = _MEM_MAP_ADDRESS | _MEM_MAP_LENGTH
        params.address = ffi.cast("void *", address)
        params.length = length
        if cuda:
            params.field_mask |= _MEM_MAP_MEMORY_TYPE
            params.memory_type = _MEMORY_CUDA
        handle = ffi.new("ucp_mem_h *")
        library.check(library.ucp.ucp_mem_map(context.handle, params, handle), f"register {length} bytes")
        self.context = context
        self.address = address
        self.length = length  # bytes
        self.cuda = cuda
        self.state: FFI.CData = ffi.new("polar_memory *", (handle[0], address, length))

    def packed_rkey(self) -> bytes:
        """The key that lets a peer read and write all of this memory: give it to authenticated peers only."""
        library = self.context.library
        ffi = library.ffi
        buffer, length = ffi.new("void **"), ffi.new("size_t *")
        status = library.ucp.ucp_rkey_pack(self.context.handle, self.state.handle, buffer, length)
        library.check(status, "pack a remote key")
        packed = bytes(ffi.buffer(buffer[0], length[0]))
        library.ucp.ucp_rkey_buffer_release(buffer[0])
        return packed

    def close(self) -> None:
        """Takes the memory back from UCX. No transfer may be under way on it."""
        if self.state.handle:
            self.context.library.ucp.ucp_mem_unmap(self.context.handle, self.state.handle)
            self.state.handle = self.context.library.ffi.NULL
            self.context.memories.discard(self)


class Context:
    """UCX for one process and one role: what its workers share.

    `tls` is UCX's list of transports (None: UCX_TLS of the environment, else everything UCX was built with);
    peer error handling needs tcp in it. `shares_memory` tells whether the list has shared memory in it, which
    is ours to use (shared.py), not UCX's. Any thread may call; close() comes last.
    """

    def __init__(self, library: Library, *, tls: str | None = None, loopback: bool = False) -> None:
        """`loopback`: all peers are on this host: keep off the network unless UCX_NET_DEVICES is set.

        UCX over tcp listens on every interface and does whatever a peer asks, to any memory of the process.
        Raises TransportError: `tls` leaves tcp out, or UCX finds no usable transport.
        """
        if tls is not None and not _offers(tls, {"tcp", "all"}):
            raise TransportError(f"UCX transports {tls!r} lack tcp, which noticing dead peers needs; add tcp")
        ffi, ucp = library.ffi, library.ucp
        config = ffi.new("ucp_config_t *")
        library.check(ucp.ucp_config_read(ffi.NULL, ffi.NULL, config), "read its configuration")
        try:
            # With rendezvous, peer error handling makes UCX give up CMA and emulate everything over TCP.
            # A connect that blocks does so for minutes where a link is down, in the middle of a batch.
            settings = {"RNDV_THRESH": "inf", "TCP_CONN_NB": "y"} | ({} if tls is None else {"TLS": tls})
            if loopback and "UCX_NET_DEVICES" not in os.environ:
                settings["NET_DEVICES"] = _LOOPBACK
            for name, value in settings.items():
                status = ucp.ucp_config_modify(config[0], name.encode(), value.encode())
                library.check(status, f"set {name} to {value!r}")
            params = ffi.new("ucp_params_t *")
            params.field_mask = _PARAM_FEATURES | _PARAM_MT_WORKERS_SHARED
            params.features = _FEATURE_RMA | _FEATURE_WAKEUP
            params.mt_workers_shared = 1
            handle = ffi.new("ucp_context_h *")
            status = ucp.ucp_init_version(*library.version[:2], params, config[0], handle)
            library.check(status, f"start with transports {tls or 'of the environment'!r}")
        finally:
            ucp.ucp_config_release(config[0])
        self.library = library
        self.handle: FFI.CData = handle[0]
        self.shares_memory = _offers(tls or os.environ.get("UCX_TLS", "all"), _SHARED_MEMORY)
        self.memories: set[RegisteredMemory] = set()
        self.workers: set[Worker] = set()

    @property
    def takes_cuda(self) -> bool:
        """Whether a GPU's memory can be registered: UCX has CUDA support and a driver, and may use them."""
        library = self.library
        attributes = library.ffi.new("ucp_context_attr_t *")
        attributes.field_mask = _ATTR_MEMORY_TYPES
        library.check(
            library.ucp.ucp_context_query(self.handle, attributes), "tell the memory that it can use"
        )
        return bool(attributes.memory_types >> _MEMORY_CUDA & 1)

    def register(self, address: int, length: int, *, cuda: bool = False) -> RegisteredMemory:
        """Pins `length` bytes at `address`, of a GPU if `cuda`, for transfers. Raises TransportError."""
        memory = RegisteredMemory(self, address, length, cuda=cuda)
        self.memories.add(memory)
        return memory

    def close(self) -> None:
        """Closes what is left open here: workers first, then memory. None of it may be in use."""
        for worker in tuple(self.workers):
            worker.close()
        for memory in tuple(self.memories):
            memory.close()
        if self.handle:
            self.library.ucp.ucp_cleanup(self.handle)
            self.handle = self.library.ffi.NULL


def _offers(tls: str, any_of: AbstractSet[str]) -> bool:
    """Whether a list of transports, in UCX's spelling, lets at least one of these be used."""
    listed = {name.strip().lstrip("\\") for name in tls.removeprefix("^").split(",")}
    return listed.isdisjoint(any_of) if tls.startswith("^") else not listed.isdisjoint(any_of)
