"""Workers, the endpoints that they reach peers through, and batches of one-sided reads and writes."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.context import Context, RegisteredMemory
from polarkv_sglang.transport.endpoint import Endpoint, RemoteKey
from polarkv_sglang.transport.library import Library
from polarkv_sglang.transport.shared import Mapped

WINDOW: Final = 512  # operations that UCX holds per route: enough to fill a link, few enough to stay quick
OPERATION_BYTES: Final = 512 << 10  # most in one, so that its checksum finds it in the second-level cache
IOV_ENTRIES: Final = 256  # most local ranges in one
IOV_ENTRY_BYTES: Final = 32 << 10  # most in each of them: more gains nothing over tcp, and loses over CMA
CHUNK_BYTES: Final = 4096  # of a block, which have digests of their own
DRAIN_S: Final = 0.5  # how long past its deadline a transfer may wait until UCX lets go of local memory

_THREAD_MODE_SERIALIZED = 1
_WORKER_PARAM_THREAD_MODE, _WORKER_ATTR_ADDRESS = 1 << 0, 1 << 1


class Direction(enum.IntEnum):
    GET = 0  # remote to local
    PUT = 1  # local to remote


class Transferred(NamedTuple):
    """What became of each block of a batch."""

    status: npt.NDArray[np.int8]  # 0: the data has arrived (of a put: at the peer); below: UCX's status
    checksums: npt.NDArray[np.uint64]  # of what was read or written; undefined where status is not 0, or
    # nobody asked for them


class WorkerStatistics(NamedTuple):
    """What a worker did since it was made."""

    batches: int
    blocks: int
    failed_blocks: int
    operations: int  # of UCX: several blocks, one, or part of one each
    got_bytes: int
    put_bytes: int
    endpoints: int  # open now
    poisoned: bool


Route: TypeAlias = RemoteKey | Mapped
"""A way to one memory of one peer: through UCX, or mapped where the peer shares it with this process."""


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
        self._poisoned = False
        self._batches = self._blocks = self._failed_blocks = self._operations = 0
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
        return endpoint

    def transfer(
        self,
        direction: Direction,
        routes: Sequence[Route],
        route: npt.NDArray[np.uint32],
        remote: npt.NDArray[np.uint64],
        local: npt.NDArray[np.uint64],
        piece_bytes: int,
        memories: Sequence[RegisteredMemory],
        deadline_s: float,
        *,
        digest: bool = True,
        digests: npt.NDArray[np.uint64] | None = None,
        iov: bool = True,
    ) -> Transferred:
        """Reads or writes blocks within `deadline_s` seconds from now, in one GIL-free call.

        Block i lies in the memory of the peer that `routes[route[i]]` leads to, in one run at address
        `remote[i]`; here it is cut into pieces of `piece_bytes` at the addresses `local[i]` (shape [blocks,
        pieces]), each inside one of `memories`. A block fails alone or with its endpoint, whose `failed` then
        says why; other routes go on. What is pending at the deadline fails as timed out (-20), and its
        endpoints are given up. On return nothing touches local memory any more; the remote memory of a failed
        put may still change. Without `digest` there are no checksums; with it `digests`, of shape [blocks,
        chunks], receives those of the chunks of all blocks that are done. Without `iov` no operation of UCX
        names more than one local range. Without both, local memory may be a GPU's as long as no route is
        mapped.

        Raises TransportError, with nothing issued, if a block names a route that is not there, or lies
        outside its mapping or these memories; on other routes remote bounds are the caller's to keep. Raises
        TransportError too if UCX did not let go of local memory within DRAIN_S after the deadline: the worker
        is then poisoned, later calls raise, and the batch's local memory is in quarantine until the worker is
        closed.
        """
        self._check_usable()
        blocks, pieces = _check_pieces(local, piece_bytes)
        _check_array("route", route, np.uint32, (blocks,))
        _check_array("remote", remote, np.uint64, (blocks,))
        if digests is not None:
            if not digest:
                raise TransportError("digests of chunks are wanted without checksums")
            _check_array("digests", digests, np.uint64, (blocks, -(-pieces * piece_bytes // CHUNK_BYTES)))
        if any(memory.context is not self.context or not memory.state.handle for memory in memories):
            raise TransportError("every memory must be open and registered with this worker's context")
        done = Transferred(np.empty(blocks, np.int8), np.empty(blocks, np.uint64))
        if not blocks:
            return done
        # All else is checked in C: long numpy loops give up the GIL, and wait a switch interval for it.
        library = self.context.library
        ffi = library.ffi
        memory_states = ffi.new("polar_memory *[]", [memory.state for memory in memories])
        route_states = ffi.new("polar_route[]", [self._describe(way) for way in routes])
        batch = ffi.new(
            "polar_batch *",
            {
                "route": ffi.from_buffer("uint32_t[]", route),
                "remote": ffi.from_buffer("uint64_t[]", remote),
                "local": ffi.from_buffer("uint64_t[]", local),
                "block_count": blocks,
                "pieces": pieces,
                "piece_bytes": piece_bytes,
                "routes": route_states,
                "route_count": len(routes),
                "memories": memory_states,
                "memory_count": len(memories),
                "put": direction is Direction.PUT,
                "hash": library.xxh3 if digest else ffi.NULL,
                "digests": ffi.NULL
                if digests is None
                else ffi.from_buffer("uint64_t[]", digests, require_writable=True),
                "window": WINDOW,
                "entries": IOV_ENTRIES if iov else 1,
                "entry_bytes": IOV_ENTRY_BYTES,
                "operation_bytes": OPERATION_BYTES,
                "timeout_ns": _nanoseconds(deadline_s),
                "drain_ns": _nanoseconds(DRAIN_S),
            },
        )
        outcome = ffi.new("polar_outcome *")
        result = library.batch.polar_transfer(
            self.state,
            batch,
            ffi.from_buffer("ucs_status_t[]", done.status, require_writable=True),
            ffi.from_buffer("uint64_t[]", done.checksums, require_writable=True),
            outcome,
        )
        if result == library.batch.POLAR_UNDRAINED:
            self._poisoned = True
            self._check_usable()
        if result != library.batch.POLAR_DONE:
            index, piece = outcome.block, outcome.piece
            size, there = f"{pieces} x {piece_bytes} bytes", f"{remote[index]:#x}"
            reasons = {
                library.batch.POLAR_NO_MEMORY: f"no memory for a batch of {blocks} blocks of {size}",
                library.batch.POLAR_BAD_ROUTE: f"block {index} takes route {route[index]} of {len(routes)}",
                library.batch.POLAR_BAD_REMOTE: f"block {index}, {size} at {there}, is outside its mapping",
                library.batch.POLAR_BAD_LOCAL: f"piece {piece} of block {index}, {piece_bytes} bytes at "
                f"{local[index, piece]:#x}, is outside the batch's {len(memories)} memories",
            }
            raise TransportError(reasons[result])
        self._batches += 1
        self._blocks += blocks
        self._failed_blocks += outcome.failed
        self._operations += outcome.operations
        self._bytes[direction] += outcome.done_bytes
        return done

    def wait(self, fds: Sequence[int], deadline_s: float) -> int | None:
        """Lets peers read and write until one of `fds` is readable or `deadline_s` seconds are over.

        Returns the index of one that is readable, None at the deadline. One GIL-free call, asleep while there
        is nothing to do. Raises TransportError.
        """
        return self._wait(fds, _nanoseconds(deadline_s))

    def serve(self, stop_fd: int) -> None:
        """Answers peers until `stop_fd` is readable, asleep while there is nothing to do.

        One GIL-free call for a memory node's whole life: give it a thread of its own, and an eventfd or pipe
        to end it. Raises TransportError.
        """
        self._wait([stop_fd], -1)

    def statistics(self) -> WorkerStatistics:
        """Counters since the worker was made."""
        return WorkerStatistics(
            batches=self._batches,
            blocks=self._blocks,
            failed_blocks=self._failed_blocks,
            operations=self._operations,
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

    def _wait(self, fds: Sequence[int], timeout_ns: int) -> int | None:
        self._check_usable()
        library = self.context.library
        polled = library.ffi.new("int[]", list(fds))
        ready = library.batch.polar_wait(self.state, polled, len(fds), timeout_ns)
        if ready < 0:
            raise TransportError(f"cannot wait for file descriptors {list(fds)}: {os.strerror(-ready)}")
        return int(ready) - 1 if ready else None

    def _describe(self, way: Route) -> tuple[FFI.CData, FFI.CData, int, int, int]:
        """A `polar_route`. Raises TransportError."""
        null = self.context.library.ffi.NULL
        if isinstance(way, Mapped):
            if not way.address:
                raise TransportError("a route's mapping is closed")
            return null, null, way.address, way.remote, way.length
        if way.endpoint.worker is not self:
            raise TransportError("every key must have been unpacked on an endpoint of this worker")
        return way.endpoint.state, way.handle, 0, 0, 0

    def _check_usable(self) -> None:
        if not self.handle:
            raise TransportError("the worker is closed")
        if self._poisoned:
            raise TransportError("UCX did not let go of a batch's local memory in time; replace the worker")


def checksums(library: Library, local: npt.NDArray[np.uint64], piece_bytes: int) -> npt.NDArray[np.uint64]:
    """Checksums of blocks in local memory, as `Worker.transfer` computes them, in one GIL-free call.

    `local` (shape [blocks, pieces]) holds addresses of pieces of `piece_bytes`: the caller answers for them.
    A block's checksum is the XXH3_64 of the XXH3_64 digests (little-endian) of its chunks of 4096 bytes, of
    which the last may be shorter, however the block is cut into pieces. Raises TransportError.
    """
    blocks, pieces = _check_pieces(local, piece_bytes)
    sums = np.empty(blocks, np.uint64)
    if blocks:
        ffi = library.ffi
        addresses = ffi.from_buffer("uint64_t[]", local)
        out = ffi.from_buffer("uint64_t[]", sums, require_writable=True)
        if library.batch.polar_checksums(library.xxh3, addresses, blocks, pieces, piece_bytes, out):
            raise TransportError(f"no memory for the digests of a block of {pieces} x {piece_bytes} bytes")
    return sums


def _check_pieces(local: npt.NDArray[np.uint64], piece_bytes: int) -> tuple[int, int]:
    """Numbers of blocks and of pieces in each. Raises TransportError."""
    if local.ndim != 2 or not local.shape[1] or piece_bytes < 1:
        raise TransportError(
            f"pieces of {piece_bytes} bytes at addresses of shape {local.shape} are no blocks"
        )
    blocks, pieces = local.shape
    _check_array("local", local, np.uint64, (blocks, pieces))
    return blocks, pieces


def _check_array(
    name: str, array: npt.NDArray[np.generic], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise TransportError(
            f"{name} must be a contiguous array of {dtype.__name__} and shape {shape}, "
            f"not of {array.dtype} and {array.shape}"
        )


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
