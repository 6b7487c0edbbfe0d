"""One-sided reads and writes between registered or shared memories, in batches with deadlines."""

from __future__ import annotations

from polarkv_sglang.transport.context import Context, RegisteredMemory
from polarkv_sglang.transport.endpoint import Endpoint, RemoteKey
from polarkv_sglang.transport.library import Library, load_library
from polarkv_sglang.transport.shared import (
    HUGE_PAGE_BYTES,
    AlignedMapping,
    Mapped,
    SharedHandle,
    attach,
    is_near,
    share,
)
from polarkv_sglang.transport.worker import (
    CHUNK_BYTES,
    DRAIN_S,
    Direction,
    Route,
    Transferred,
    Worker,
    WorkerStatistics,
    checksums,
)

__all__ = [
    "CHUNK_BYTES",
    "DRAIN_S",
    "HUGE_PAGE_BYTES",
    "AlignedMapping",
    "Context",
    "Direction",
    "Endpoint",
    "Library",
    "Mapped",
    "RegisteredMemory",
    "RemoteKey",
    "Route",
    "SharedHandle",
    "Transferred",
    "Worker",
    "WorkerStatistics",
    "attach",
    "checksums",
    "is_near",
    "load_library",
    "share",
]
