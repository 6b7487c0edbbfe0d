"""A memory node: lends memory to the pool. Control server on the event loop, UCX in a thread of its own.

Payloads pass Python by: clients read and write the slab over UCX, and the node's thread is one C call.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from polarkv_sglang import __version__
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.session import Service, Session
from polarkv_sglang.pool.slab import Slab, SlabMemory, default_segment_bytes
from polarkv_sglang.transport import Context, Worker, load_library
from polarkv_sglang.transport.messages import NODE_ID_BYTES, NodeStatistics, Welcome

EXPIRY_INTERVAL_S = 1.0
START_GRACE_S = 30.0  # an embedded node waits this long for its first lifeline
LINGER_S = 2.0  # and this long after its last
_BACKLOG = 512

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """How a memory node is started."""

    host: str
    port: int  # 0: any
    capacity_bytes: int
    segment_bytes: int | None = None  # None: by capacity
    token: str | None = None
    prefault: bool = False  # back the slab by physical pages now, in the background
    ucx_tls: str | None = None
    ucx_library: str | None = None
    embedded: bool = False  # end with the last lifeline


class MemoryNode:
    """A running memory node; made by ``memory_node``. Used on the event loop's thread only."""

    def __init__(
        self, settings: NodeSettings, libucp: str, slab: Slab, worker_address: bytes, rkey: bytes
    ) -> None:
        self.host, self.port = settings.host, settings.port
        self.node_id = os.urandom(NODE_ID_BYTES)
        self.libucp = libucp  # version and where it was found
        self.capacity_bytes = slab.capacity_bytes
        self.service = Service(
            index=Index(slab),
            token=settings.token,
            welcome=Welcome(
                self.node_id, worker_address, rkey, slab.base_address, slab.capacity_bytes, slab.segment_bytes
            ),
            statistics=self.statistics,
            lifelines_changed=self._lifelines_changed,
        )
        self._embedded = settings.embedded
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._unheld: asyncio.TimerHandle | None = None
        if self._embedded:
            self._unheld = self._loop.call_later(START_GRACE_S, self.stop)

    @property
    def address(self) -> str:
        """``host:port`` of the control server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def stop(self) -> None:
        """Ask the node to end."""
        self._stopping.set()

    async def stopped(self) -> None:
        """Returns once the node was asked to end."""
        await self._stopping.wait()

    def statistics(self, request_id: int = 0) -> NodeStatistics:
        """The node at this moment."""
        service = self.service
        return NodeStatistics(
            request_id=request_id,
            node_id=self.node_id,
            version=__version__,
            libucp=self.libucp,
            uptime_s=time.monotonic() - self._started,
            connections=len(service.sessions),
            bad_frames_total=service.bad_frames,
            refused_total=dict(service.refused + service.index.refused),
            **service.index.statistics()._asdict(),
        )

    def statistics_from_thread(self, timeout_s: float = 5.0) -> NodeStatistics:
        """The same for other threads; TimeoutError if the node is too busy to answer."""

        async def read() -> NodeStatistics:
            return self.statistics()

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result(timeout_s)

    def _lifelines_changed(self, count: int) -> None:
        if not self._embedded:
            return
        if self._unheld is not None:
            self._unheld.cancel()
        self._unheld = None if count else self._loop.call_later(LINGER_S, self.stop)


@asynccontextmanager
async def memory_node(settings: NodeSettings) -> AsyncIterator[MemoryNode]:
    """A memory node that serves until the block is left.

    Raises ConfigError if the capacity or the address cannot be had, TransportError if UCX cannot be used,
    and TransportError at the end if UCX gave up meanwhile.
    """
    segment_bytes = settings.segment_bytes or default_segment_bytes(settings.capacity_bytes)
    async with AsyncExitStack() as stack:
        memory = SlabMemory(settings.capacity_bytes)
        stack.callback(memory.close)
        slab = Slab(memory.base_address, memory.capacity_bytes, segment_bytes)
        library = load_library(settings.ucx_library)
        context = Context(library, tls=settings.ucx_tls)
        stack.callback(context.close)
        registered = context.register(memory.base_address, memory.capacity_bytes)
        worker = Worker(context)
        libucp = f"{'.'.join(map(str, library.version))} ({library.source})"
        node = MemoryNode(settings, libucp, slab, worker.address, registered.packed_rkey())
        await stack.enter_async_context(_serving_ucx(worker, node))
        if settings.prefault:
            await stack.enter_async_context(_prefaulting(memory))
        await stack.enter_async_context(_expiring(node.service.index))
        await stack.enter_async_context(_listening(node))
        yield node


@asynccontextmanager
async def _serving_ucx(worker: Worker, node: MemoryNode) -> AsyncIterator[None]:
    stop_fd = os.eventfd(0)
    serving = asyncio.get_running_loop().run_in_executor(None, worker.serve, stop_fd)
    serving.add_done_callback(lambda _: node.stop())
    try:
        yield
    finally:
        os.eventfd_write(stop_fd, 1)
        try:
            await serving
        finally:
            os.close(stop_fd)


@asynccontextmanager
async def _prefaulting(memory: SlabMemory) -> AsyncIterator[None]:
    stop = threading.Event()

    def prefault() -> None:
        try:
            memory.prefault(stop)
        except OSError as error:
            _logger.warning("prefault ended early, first writes will be slow: %s", error)

    done = asyncio.get_running_loop().run_in_executor(None, prefault)
    try:
        yield
    finally:
        stop.set()
        await done


@asynccontextmanager
async def _expiring(index: Index) -> AsyncIterator[None]:
    async def expire() -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            index.expire()

    task = asyncio.create_task(expire())
    try:
        yield
    finally:
        task.cancel()


@asynccontextmanager
async def _listening(node: MemoryNode) -> AsyncIterator[None]:
    try:
        server = await asyncio.get_running_loop().create_server(
            lambda: Session(node.service), node.host, node.port, backlog=_BACKLOG
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {node.address}: {error.strerror}") from error
    bound = server.sockets[0].getsockname()
    node.port = bound[1]
    if node.service.token is None and not ipaddress.ip_address(bound[0]).is_loopback:
        _logger.warning(
            "whoever reaches %s can use this pool; set POLARKV_TOKEN to ask for a token", node.address
        )
    try:
        yield
    finally:
        server.close()
        for session in tuple(node.service.sessions):
            session.abort()
