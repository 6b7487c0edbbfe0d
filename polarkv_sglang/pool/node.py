"""A memory node: lends memory to the pool. Control server on the event loop; UCX, and streams, on threads.

Payloads pass Python by: clients map the slab, or read and write it over UCX, for which a thread is in one C
call; what is streamed is one C call a request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from polarkv_sglang import __version__
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.nodes import is_loopback
from polarkv_sglang.pool.notes import Notes, notes_bytes
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.pool.push import Pushers
from polarkv_sglang.pool.replication import Replicator
from polarkv_sglang.pool.session import Service, Session
from polarkv_sglang.pool.slab import Slab, SlabMemory, default_segment_bytes, make_directory
from polarkv_sglang.pool.stream import Streams
from polarkv_sglang.transport import Context, Worker, load_library, share
from polarkv_sglang.transport.messages import NODE_ID_BYTES, NodeStatistics, Welcome

EXPIRY_INTERVAL_S = 1.0
START_GRACE_S = 30.0  # an embedded node waits this long for its first lifeline
LINGER_S = 2.0  # and this long after its last
COPY_DEADLINE_S = 2.0  # for one batch of blocks that go to another node
_BACKLOG = 512
# While the kernel fills a step, mapping memory in this process waits, and page faults wait for that: with
# 64 MiB puts took 30 ms until all was filled.
_PREFAULT_STEP_BYTES = 2 << 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """How a memory node is started."""

    host: str
    port: int  # 0: any
    capacity_bytes: int
    segment_bytes: int | None = None  # None: by capacity
    token: str | None = None
    tls: ssl.SSLContext | None = None  # of the control plane
    client_tls: ssl.SSLContext | None = None  # to other nodes, when blocks are copied there
    prefault: bool = True  # back the slab by physical pages now, in the background
    ucx_tls: str | None = None
    ucx_library: str | None = None
    embedded: bool = False  # end with the last lifeline


class MemoryNode:
    """A running memory node; made by ``memory_node``. Used on the event loop's thread only."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        libucp: str,
        memory: SlabMemory,
        welcome: Welcome,
        index: Index,
        pushers: Pushers,
        streams: Streams,
    ) -> None:
        self.host, self.port = settings.host, settings.port
        self.node_id = welcome.node_id
        self.libucp = libucp  # version and where it was found
        self._memory = memory
        self.capacity_bytes = welcome.capacity_bytes
        self.service = Service(
            index=index,
            notes=streams.notes,
            pushers=pushers,
            streams=streams,
            token=settings.token,
            tls=settings.tls,
            welcome=welcome,
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
    def pages(self) -> str:
        """What backs the slab, as far as it is backed."""
        return self._memory.pages

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
        views, views_left_out = service.views()
        counted = service.index.statistics()._asdict()
        counted["sent_blocks_total"] += service.pushers.sent_blocks
        counted["sent_bytes_total"] += service.pushers.sent_bytes
        return NodeStatistics(
            request_id=request_id,
            node_id=self.node_id,
            version=__version__,
            libucp=self.libucp,
            pages=self.pages,
            uptime_s=time.monotonic() - self._started,
            notes_bytes=service.notes.used_bytes,
            connections=len(service.sessions),
            bad_frames_total=service.bad_frames,
            refused_total=dict(service.refused + service.index.refused()),
            failed_sends_total=service.pushers.failed_blocks,
            views=views,
            views_left_out=views_left_out,
            **counted,
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
        context = Context(library, tls=settings.ucx_tls, loopback=is_loopback(settings.host))
        stack.callback(context.close)
        registered = context.register(memory.base_address, memory.capacity_bytes)
        worker = Worker(context)
        directory = make_directory(memory.capacity_bytes) if context.shares_memory else None
        if directory is not None:
            stack.callback(directory.close)
        index = Index(slab, directory=directory)
        welcome = Welcome(
            node_id=os.urandom(NODE_ID_BYTES),
            worker_address=worker.address,
            rkey=registered.packed_rkey(),
            base_address=slab.base_address,
            capacity_bytes=slab.capacity_bytes,
            segment_bytes=slab.segment_bytes,
            most_granted_bytes=index.most_granted_bytes,
            shared=share(memory.fd, memory.capacity_bytes) if context.shares_memory else None,
            directory=share(directory.fd, directory.length) if directory is not None else None,
        )
        pushers = Pushers(index, context, registered)
        stack.push_async_callback(pushers.close)
        streams = Streams(index, Notes(notes_bytes(slab.capacity_bytes)))
        stack.push_async_callback(streams.close)
        libucp = f"{'.'.join(map(str, library.version))} ({library.source})"
        node = MemoryNode(
            settings,
            libucp=libucp,
            memory=memory,
            welcome=welcome,
            index=index,
            pushers=pushers,
            streams=streams,
        )
        await stack.enter_async_context(_serving_ucx(worker, node))
        await stack.enter_async_context(_replicating(node.service, memory, settings))
        if settings.prefault:
            await stack.enter_async_context(_prefaulting(memory, directory))
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
async def _prefaulting(memory: SlabMemory, directory: SharedMemory | None) -> AsyncIterator[None]:
    stop = threading.Event()

    def prefault() -> None:
        try:
            if directory is not None:  # else whoever looks there first pays for its pages
                directory.prefault(stop, _PREFAULT_STEP_BYTES)
            memory.prefault(stop, _PREFAULT_STEP_BYTES)
        except OSError as error:
            _logger.warning("prefault ended early, first writes will be slow: %s", error)

    done = asyncio.get_running_loop().run_in_executor(None, prefault)
    try:
        yield
    finally:
        stop.set()
        await done


@asynccontextmanager
async def _replicating(service: Service, memory: SlabMemory, settings: NodeSettings) -> AsyncIterator[None]:
    def connect(address: str) -> PoolClient:
        return PoolClient(
            [address],
            token=settings.token,
            tls=settings.client_tls,
            deadline_s=COPY_DEADLINE_S,
            client="copies of a memory node",
            ucx_library=settings.ucx_library,
            ucx_tls=settings.ucx_tls,
        )

    replicator = Replicator(service.index, memory, connect)
    service.replicate = replicator.submit
    task = asyncio.create_task(replicator.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


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
    secured = node.service.token is not None or node.service.tls is not None
    if not secured and not ipaddress.ip_address(bound[0]).is_loopback:
        _logger.warning(
            "whoever reaches %s can use this pool; set POLARKV_TOKEN to ask for a token, or use TLS",
            node.address,
        )
    try:
        yield
    finally:
        node.service.closing = True
        server.close()
        for session in tuple(node.service.sessions):
            session.abort()
