"""UCX: one-sided reads and writes between registered memories, in batches with deadlines."""

from __future__ import annotations

from polarkv_sglang.transport.context import Context, RegisteredMemory
from polarkv_sglang.transport.library import Library, load_library
from polarkv_sglang.transport.worker import (
    DRAIN_S,
    OPERATION,
    Direction,
    Endpoint,
    RemoteKey,
    Worker,
    WorkerStatistics,
)

__all__ = [
    "DRAIN_S",
    "OPERATION",
    "Context",
    "Direction",
    "Endpoint",
    "Library",
    "RegisteredMemory",
    "RemoteKey",
    "Worker",
    "WorkerStatistics",
    "load_library",
]
