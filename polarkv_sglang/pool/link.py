"""Lanes and links: how one kind of work of a rank reaches the memory nodes."""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import numpy as np

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.granted import GrantedSlots
from polarkv_sglang.transport import Context, Direction, Mapped, RemoteKey, Worker, attach, is_near
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.directory import Directory, open_directory
from polarkv_sglang.transport.messages import Streaming, Welcome
from polarkv_sglang.transport.stream import Exchange

_PROBE_BYTES = 64
# What is copied twice more by a socket then takes less time than the exchange that is saved.
_MOST_CARRIED_BYTES = 512 << 10


class Link(NamedTuple):
    """One lane's way to one memory node."""

    address: str
    control: ControlConnection
    route: RemoteKey | Mapped | None  # to its slab, over UCX or in our address space
    pushed: bool = False  # no route: its transport emulates gets, so the node puts what we read
    streamed: bool = False  # no route: there is nothing better than TCP, so blocks go through ``control``
    carries_few: bool = False  # there is a route, but few blocks go through ``control`` as well
    directory: Directory | None = None  # of a mapped slab: what it has is read without asking the node
    granted: GrantedSlots | None = None  # of a directory with a ring: blocks are written without asking

    def carries(self, size: int) -> bool:
        """Whether blocks of ``size`` bytes in all go through ``control``.

        In one exchange: copying from or to a mapping, which is quicker for many, takes one before it, and
        another one behind it to write, unless a directory has what is read, or slots are granted.
        """
        return self.streamed or (self.carries_few and size <= _MOST_CARRIED_BYTES)

    @property
    def failed(self) -> str | None:
        """Why UCX cannot use the link any more, or None. A mapped slab outlives its node."""
        return self.route.endpoint.failed if isinstance(self.route, RemoteKey) else None

    def close(self) -> None:
        """Give it up; nothing may be in flight on it."""
        self.control.close()
        if self.directory is not None:
            self.directory.close()
        if self.route is not None:
            _close(self.route)


class Lane:
    """Links to all memory nodes for one kind of work, ``reads`` or writes; lanes never wait for each other.

    ``lock`` is held for a whole batch, and by the connector while it adds or drops a link: a UCX worker
    belongs to one thread at a time.
    """

    def __init__(self, context: Context | None, *, reads: bool, by_processor: bool = True) -> None:
        """Without ``context`` the lane moves no data.

        ``by_processor``: it may touch our memory, to copy what nodes of this host share and to send blocks
        through connections. Else UCX moves everything.
        """
        self._reads = reads
        self._by_processor = by_processor
        self.lock = threading.Lock()
        self._context = context
        self.exchange = Exchange(context.library) if context is not None else None  # through connections
        self.worker = Worker(context) if context is not None else None
        # UCX makes no worker while a network device that it knows is down, which is when another is needed.
        self._spare = Worker(context) if context is not None else None
        self.links: dict[str, Link] = {}
        self._probe = np.zeros(_PROBE_BYTES, np.uint8)
        if context is not None:
            self._probe_memory = context.register(self._probe.ctypes.data, self._probe.nbytes)

    def add(self, address: str, control: ControlConnection, deadline_s: float) -> None:
        """Take a connection into use.

        Raises TransportError if its memory cannot be reached in time, NodeError if the node does not answer.
        """
        streaming = Streaming(0, False)
        if control.can_stream and (self._by_processor or not self._reads):
            # Before it is ours: nobody else waits for the node's answer.
            streaming = control.start_streaming(deadline_s, ring=self._may_map(control.welcome))
        threaded = streaming.threaded
        with self.lock:
            self._provide_workers()
            route = self._reach(control.welcome, deadline_s) if self.worker is not None else None
            pushed = streamed = False
            if isinstance(route, RemoteKey) and route.endpoint.emulates_get:
                streamed = threaded and self._by_processor
                pushed = self._reads and not streamed
                if pushed or streamed:
                    _close(route)
                    route = None
            carries_few = threaded and isinstance(route, Mapped)
            directory = self._directory(control.welcome, route, streaming)
            granted = None
            if directory is not None and directory.has_ring and not self._reads:
                granted = GrantedSlots(directory.library, control, directory)
            self._set(Link(address, control, route, pushed, streamed, carries_few, directory, granted))

    def _directory(
        self, welcome: Welcome, route: RemoteKey | Mapped | None, streaming: Streaming
    ) -> Directory | None:
        if self._context is None or not isinstance(route, Mapped) or welcome.directory is None:
            return None
        return open_directory(self._context.library, welcome.directory, route, streaming.ring)

    def _may_map(self, welcome: Welcome) -> bool:
        """Whether a node's memory is to be used as our own."""
        if self._context is None or welcome.shared is None:
            return False
        return self._by_processor and self._context.shares_memory and is_near(welcome.shared)

    def _set(self, link: Link) -> None:
        self.drop(link.address)
        self.links[link.address] = link

    def try_out(self, welcome: Welcome, deadline_s: float) -> None:
        """Reach a node's memory once and leave it again; TransportError if that cannot be done in time."""
        with self.lock:
            self._provide_workers()
            route = self._reach(welcome, deadline_s)
            _close(route)

    def drop(self, address: str) -> None:
        """Give a link up; the caller holds ``lock``. No batch is under way, so nothing is in flight on it."""
        link = self.links.pop(address, None)
        if link is not None:
            link.close()

    def replace_worker(self) -> list[str]:
        """Stop UCX from touching our memory: closing the worker makes it let go. Hold ``lock``.

        Links without an endpoint live on, if there is a spare worker; the addresses of the others, which are
        dropped, are returned. Without one the lane moves nothing until a node is added.
        """
        if self.worker is None:
            return []
        dropped = [
            address
            for address, link in self.links.items()
            if self._spare is None or isinstance(link.route, RemoteKey)
        ]
        for address in dropped:
            self.drop(address)
        self.worker.close()
        self.worker, self._spare = self._spare, None
        return dropped

    def close(self) -> None:
        """Close all links and the worker."""
        with self.lock:
            for address in list(self.links):
                self.drop(address)
            for worker in (self.worker, self._spare):
                if worker is not None:
                    worker.close()

    def _provide_workers(self) -> None:
        """TransportError if there is none and UCX makes none; a spare one can come later."""
        if self._context is None:
            return
        if self.worker is None:
            self.worker = Worker(self._context)
        if self._spare is None:
            with contextlib.suppress(TransportError):
                self._spare = Worker(self._context)

    def _reach(self, welcome: Welcome, deadline_s: float) -> RemoteKey | Mapped:
        assert self._context is not None
        assert self.worker is not None
        if welcome.shared is not None and self._may_map(welcome):
            mapped = attach(welcome.shared, welcome.base_address)
            if mapped is not None:
                return mapped
        endpoint = self.worker.connect(welcome.worker_address)
        try:
            key = endpoint.unpack(welcome.rkey)
        except TransportError:
            endpoint.close(force=True)
            raise
        self._read_a_little(key, welcome.base_address, deadline_s)
        return key

    def _read_a_little(self, key: RemoteKey, remote: int, deadline_s: float) -> None:
        """UCX sets an endpoint up at its first operation: have that done, and seen to work, in time."""
        assert self.worker is not None
        try:
            done = self.worker.transfer(
                Direction.GET,
                [key],
                np.zeros(1, np.uint32),
                np.array([remote], np.uint64),
                np.array([[self._probe.ctypes.data]], np.uint64),
                _PROBE_BYTES,
                [self._probe_memory],
                deadline_s,
            )
        except TransportError:
            self.replace_worker()
            raise
        if done.status.any():
            reason = key.endpoint.failed or "no answer in time"
            key.endpoint.close(force=True)
            raise TransportError(f"its memory cannot be read over UCX: {reason}")


def _close(route: RemoteKey | Mapped) -> None:
    if isinstance(route, RemoteKey):
        route.endpoint.close(force=True)
    else:
        route.close()
