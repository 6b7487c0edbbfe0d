"""Workers, the endpoints that they reach peers through, and batches of one-sided reads and writes."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.context import Context, RegisteredMemory

OPERATION: Final = np.dtype(
    [("local", "u8"), ("remote", "u8"), ("length", "u8"), ("endpoint", "u4"), ("memory", "u4")]
)
"""One read or write: two addresses, bytes, and indexes into the batch's endpoints (and keys) and memories."""

WINDOW: Final = 512  # operations that UCX holds per endpoint: enough to fill a link, few enough to stay quick
DRAIN_S: Final = 0.5  # how long past its deadline a transfer may wait until UCX lets go of local memory

_CLOSE_S: Final = 1.0
_THREAD_MODE_SERIALIZED = 1
_ERR_HANDLING_MODE_PEER = 1
_WORKER_PARAM_THREAD_MODE, _WORKER_ATTR_ADDRESS = 1 << 0, 1 << 1
_EP_PARAM_ADDRESS, _EP_PARAM_ERR_MODE, _EP_PARAM_ERR_HANDLER = 1 << 0, 1 << 1, 1 << 2


class Direction(enum.IntEnum):
    GET = 0  # remote to local
    PUT = 1  # local to remote


class WorkerStatistics(NamedTuple):
    """What a worker did since it was made."""

    batches: int
    operations: int
    failed_operations: int
    got_bytes: int
    put_bytes: int
    endpoints: int  # open now
    poisoned: bool


class RemoteKey:
    """Access to one peer's registered memory through one endpoint; ends with the endpoint."""

    def __init__(self, endpoint: Endpoint, handle: FFI.CData) -> None:
        self.endpoint = endpoint
        self.handle = handle


class Endpoint:
    """A worker's connection to one peer. Same thread rule as its worker."""

    def __init__(self, worker: Worker, peer_address: bytes) -> None:
        library = worker.context.library
        ffi = library.ffi
        # UCX writes the failure here, from C, whenever the worker is progressed.
        self.state: FFI.CData = ffi.new("polar_endpoint *")
        address = ffi.from_buffer(peer_address)
        params = ffi.new("ucp_ep_params_t *")
        params.field_mask = _EP_PARAM_ADDRESS | _EP_PARAM_ERR_MODE | _EP_PARAM_ERR_HANDLER
        params.address = address
        params.err_mode = _ERR_HANDLING_MODE_PEER
        params.err_handler.cb = ffi.cast("ucp_err_handler_cb_t", library.batch.polar_endpoint_failed)
        params.err_handler.arg = self.state
        handle = ffi.new("ucp_ep_h *")
        status = library.ucp.ucp_ep_create(worker.handle, params, handle)
        library.check(status, "make an endpoint (peer error handling needs tcp in UCX_TLS)")
        self.state.handle = handle[0]
        self.worker = worker
        self._keys: list[RemoteKey] = []

    @property
    def failed(self) -> str | None:
        """Why the endpoint cannot be used any more, or None; the way on is close() and a new connect()."""
        return self.worker.context.library.describe(self.state.status) if self.state.status else None

    def unpack(self, rkey: bytes) -> RemoteKey:
        """Makes a peer's packed key usable here. Raises TransportError."""
        library = self.worker.context.library
        if self.failed:
            raise TransportError(f"endpoint failed: {self.failed}; connect again")
        handle = library.ffi.new("ucp_rkey_h *")
        status = library.ucp.ucp_ep_rkey_unpack(self.state.handle, library.ffi.from_buffer(rkey), handle)
        library.check(status, "unpack a remote key")
        key = RemoteKey(self, handle[0])
        self._keys.append(key)
        return key

    def close(self, *, force: bool = False) -> None:
        """Gives up the endpoint and its keys; without `force` the peer is told, which may take a second."""
        library = self.worker.context.library
        while self._keys:
            library.ucp.ucp_rkey_destroy(self._keys.pop().handle)
        library.batch.polar_close(self.worker.state, self.state, force, _nanoseconds(_CLOSE_S))
        self.worker.endpoints.discard(self)


class Worker:
    """One lane of UCX: endpoints and the transfers on them.

    Not thread safe: its owner makes one call at a time. Reads and writes have a worker each, so that neither
    waits for the other.
    """

    def __init__(self, context: Context) -> None:
        library = context.library
        ffi, ucp = library.ffi, library.ucp
        params = ffi.new("ucp_worker_params_t *")
        params.field_mask = _WORKER_PARAM_THREAD_MODE
        params.thread_mode = _THREAD_MODE_SERIALIZED
        handle = ffi.new("ucp_worker_h *")
        library.check(ucp.ucp_worker_create(context.handle, params, handle), "create a worker")
        event_fd = ffi.new("int *")
        library.check(ucp.ucp_worker_get_efd(handle[0], event_fd), "get a worker's event descriptor")
        self.context = context
        self.handle: FFI.CData = handle[0]
        self.state: FFI.CData = ffi.new("polar_worker *", (library.entry_points, handle[0], event_fd[0]))
        self.endpoints: set[Endpoint] = set()
        # UCX may report on an endpoint after its close: what it writes to lives as long as the worker.
        self._endpoint_states: list[FFI.CData] = []
        self._poisoned = False
        self._batches = self._operations = self._failed_operations = 0
        self._bytes = {Direction.GET: 0, Direction.PUT: 0}
        context.workers.add(self)

    @property
    def address(self) -> bytes:
        """What a peer's connect() needs."""
        library = self.context.library
        attributes = library.ffi.new("ucp_worker_attr_t *")
        attributes.field_mask = _WORKER_ATTR_ADDRESS
        library.check(library.ucp.ucp_worker_query(self.handle, attributes), "read a worker's address")
        address = bytes(library.ffi.buffer(attributes.address, attributes.address_length))
        library.ucp.ucp_worker_release_address(self.handle, attributes.address)
        return address

    def connect(self, peer_address: bytes) -> Endpoint:
        """Makes an endpoint; a peer that does not answer is found out by the first transfer.

        UCX trusts the address: take it from an authenticated peer only. Raises TransportError.
        """
        self._check_usable()
        endpoint = Endpoint(self, peer_address)
        self.endpoints.add(endpoint)
        self._endpoint_states.append(endpoint.state)
        return endpoint

    def transfer(
        self,
        direction: Direction,
        operations: npt.NDArray[np.void],
        endpoints: Sequence[Endpoint],
        memories: Sequence[RegisteredMemory],
        keys: Sequence[RemoteKey],
        deadline_s: float,
    ) -> npt.NDArray[np.int8]:
        """Carries out a batch of reads or writes within `deadline_s` seconds from now, in one GIL-free call.

        `operations` is a contiguous array of OPERATION; `keys[i]` was unpacked on `endpoints[i]` (a peer with
        several keys takes several places). Returns one int8 per operation: 0 once the data has arrived (for a
        put: at the peer), else the UCX status (below 0). An operation fails alone or with its endpoint, whose
        `failed` then says why; other endpoints go on. What is pending at the deadline fails as timed out
        (-20), and its endpoints are given up. On return UCX no longer touches local memory; the remote memory
        of a failed put may still change.

        Raises TransportError, with nothing issued, if an operation lies outside its local memory or names an
        endpoint or memory that is not there; remote bounds are the caller's to keep. Raises TransportError
        too if UCX did not let go of local memory within DRAIN_S after the deadline: the worker is then
        poisoned, later calls raise, and the batch's local memory is in quarantine until the worker is closed.
        """
        self._check_usable()
        library = self.context.library
        ffi = library.ffi
        if operations.dtype != OPERATION or operations.ndim != 1 or not operations.flags.c_contiguous:
            raise TransportError(
                f"operations must be a contiguous 1-d array of OPERATION, not {operations.dtype}"
            )
        if [key.endpoint for key in keys] != list(endpoints) or any(e.worker is not self for e in endpoints):
            raise TransportError("every endpoint must be this worker's own, with its key at the same index")
        if any(memory.context is not self.context or not memory.state.handle for memory in memories):
            raise TransportError("every memory must be open and registered with this worker's context")
        statuses = np.empty(len(operations), np.int8)
        if not len(operations):
            return statuses
        # Bounds are checked in C: long numpy loops give up the GIL, and wait a switch interval for it.
        rows = ffi.from_buffer("polar_operation[]", operations)
        endpoint_states = ffi.new("polar_endpoint *[]", [endpoint.state for endpoint in endpoints])
        key_handles = ffi.new("ucp_rkey_h[]", [key.handle for key in keys])
        memory_states = ffi.new("polar_memory *[]", [memory.state for memory in memories])
        batch = ffi.new(
            "polar_batch *",
            {
                "operations": rows,
                "operation_count": len(operations),
                "endpoints": endpoint_states,
                "keys": key_handles,
                "endpoint_count": len(endpoints),
                "memories": memory_states,
                "memory_count": len(memories),
                "put": direction is Direction.PUT,
                "window": WINDOW,
                "timeout_ns": _nanoseconds(deadline_s),
                "drain_ns": _nanoseconds(DRAIN_S),
            },
        )
        outcome = ffi.new("polar_outcome *")
        out = ffi.from_buffer("ucs_status_t[]", statuses, require_writable=True)
        result = library.batch.polar_transfer(self.state, batch, out, outcome)
        if result == library.batch.POLAR_REFUSED:
            refused = dict(zip(OPERATION.names or (), operations[outcome.refused].item(), strict=True))
            raise TransportError(
                f"operation {outcome.refused} {refused} is outside the batch's {len(endpoints)} endpoints "
                f"and {len(memories)} memories"
            )
        if result == library.batch.POLAR_NO_MEMORY:
            raise TransportError(f"no memory for a batch of {len(operations)} operations")
        if result == library.batch.POLAR_UNDRAINED:
            self._poisoned = True
            self._check_usable()
        self._batches += 1
        self._operations += len(operations)
        self._failed_operations += outcome.failed
        self._bytes[direction] += outcome.done_bytes
        return statuses

    def serve(self, stop_fd: int) -> None:
        """Answers peers until `stop_fd` is readable, asleep while there is nothing to do.

        One GIL-free call for a memory node's whole life: give it a thread of its own, and an eventfd or pipe
        to end it. Raises TransportError.
        """
        self._check_usable()
        error = self.context.library.batch.polar_serve(self.state, stop_fd)
        if error:
            raise TransportError(f"cannot wait for file descriptor {stop_fd}: {os.strerror(error)}")

    def statistics(self) -> WorkerStatistics:
        """Counters since the worker was made."""
        return WorkerStatistics(
            batches=self._batches,
            operations=self._operations,
            failed_operations=self._failed_operations,
            got_bytes=self._bytes[Direction.GET],
            put_bytes=self._bytes[Direction.PUT],
            endpoints=len(self.endpoints),
            poisoned=self._poisoned,
        )

    def close(self) -> None:
        """Gives up all endpoints by force, then the worker; its transfers' memory is touched no more."""
        if not self.handle:
            return
        for endpoint in tuple(self.endpoints):
            endpoint.close(force=True)
        self.context.library.ucp.ucp_worker_destroy(self.handle)
        self.handle = self.state.handle = self.context.library.ffi.NULL
        self.context.workers.discard(self)

    def _check_usable(self) -> None:
        if not self.handle:
            raise TransportError("the worker is closed")
        if self._poisoned:
            raise TransportError("UCX did not let go of a batch's local memory in time; replace the worker")


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
