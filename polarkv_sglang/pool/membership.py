"""Which memory nodes a rank can use now, and the links to them; connecting happens off the hot path."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from polarkv_sglang.errors import NodeError, PolarError, TransportError
from polarkv_sglang.transport import OPERATION, Context, Direction, Endpoint, RemoteKey, Worker
from polarkv_sglang.transport.control import ControlConnection, NodeRefused

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 10.0
_PROBE_BYTES = 64


class Link(NamedTuple):
    """One lane's way to one memory node."""

    address: str
    control: ControlConnection
    endpoint: Endpoint | None  # none on a lane that moves no data
    remote_key: RemoteKey | None


class Lane:
    """Links to all memory nodes for one kind of work; lanes never wait for each other.

    ``lock`` is held for a whole batch, and by the connector while it adds a link: a UCX worker
    belongs to one thread at a time.
    """

    def __init__(self, name: str, context: Context | None) -> None:
        self.name = name
        self.lock = threading.Lock()
        self._context = context
        self.worker = Worker(context) if context is not None else None
        self.links: dict[str, Link] = {}
        self._probe = np.zeros(_PROBE_BYTES, np.uint8)
        self._probe_memory = (
            context.register(self._probe.ctypes.data, self._probe.nbytes) if context is not None else None
        )

    def add(self, address: str, control: ControlConnection, deadline_s: float) -> None:
        """Take a connection into use; TransportError if UCX does not reach the node in time."""
        endpoint = key = None
        with self.lock:
            if self.worker is not None:
                endpoint = self.worker.connect(control.welcome.worker_address)
                key = endpoint.unpack(control.welcome.rkey)
                self._read_a_little(endpoint, key, control.welcome.base_address, deadline_s)
            self.drop(address)
            self.links[address] = Link(address, control, endpoint, key)

    def _read_a_little(self, endpoint: Endpoint, key: RemoteKey, remote: int, deadline_s: float) -> None:
        """UCX sets an endpoint up at its first operation: have that done, and seen to work, in time."""
        assert self.worker is not None
        assert self._probe_memory is not None
        operation = np.array([(self._probe.ctypes.data, remote, _PROBE_BYTES, 0, 0)], OPERATION)
        memories = [self._probe_memory]
        try:
            status = self.worker.transfer(Direction.GET, operation, [endpoint], memories, [key], deadline_s)
        except TransportError:
            self.replace_worker()
            raise
        if status.any():
            reason = endpoint.failed or "no answer in time"
            endpoint.close(force=True)
            raise TransportError(f"its memory cannot be read over UCX: {reason}")

    def drop(self, address: str) -> None:
        """Give a link up; the caller holds ``lock``. No batch is under way, so nothing is in flight on it."""
        link = self.links.pop(address, None)
        if link is None:
            return
        link.control.close()
        if link.endpoint is not None:
            link.endpoint.close(force=True)

    def replace_worker(self) -> None:
        """When UCX did not let go of a batch's memory: closing the worker makes it. Hold ``lock``."""
        for address in list(self.links):
            self.drop(address)
        if self.worker is not None and self._context is not None:
            old, self.worker = self.worker, Worker(self._context)
            old.close()

    def close(self) -> None:
        with self.lock:
            for address in list(self.links):
                self.drop(address)
            if self.worker is not None:
                self.worker.close()


class _Attempt(NamedTuple):
    due: float  # time.monotonic
    wait_s: float


class Membership:
    """The memory nodes that answer, as this rank sees them.

    A node that fails once on any lane is out on all of them, at once: that is the circuit breaker. It
    costs its batch at most one deadline and the batches after it nothing. The connector thread tries
    it again, ever less often, and brings it back when all lanes are linked. Ranks may see different
    nodes for a while: they then look for a stripe in different places, which is a miss.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        lanes: Sequence[Lane],
        *,
        token: str | None,
        client: str,
        deadline_s: float,
    ) -> None:
        self.addresses = tuple(addresses)
        self._lanes = tuple(lanes)
        self._token = token
        self._client = client
        self._deadline_s = deadline_s
        self._live: Mapping[str, int] = MappingProxyType({})
        self._reasons: dict[str, str] = {}
        self._attempts = {address: _Attempt(0.0, _FIRST_RETRY_S) for address in self.addresses}
        self._changed = threading.Condition()
        self._closing = False
        self._tried: set[str] = set()
        self._thread = threading.Thread(target=self._connect_forever, name="polarkv-connect", daemon=True)
        self._thread.start()

    @property
    def live(self) -> Mapping[str, int]:
        """Address -> capacity in bytes of the nodes that can be used; replaced, never changed."""
        return self._live

    def wait_tried(self, timeout_s: float) -> bool:
        """Whether every node was connected to or given up on once within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._tried) == len(self.addresses), timeout_s)

    def reasons(self) -> dict[str, str]:
        """Why the nodes that are not live are not."""
        with self._changed:
            return dict(self._reasons)

    def down(self, address: str, reason: str) -> None:
        """A node failed: use it no more until the connector has linked it again. Called by any lane."""
        with self._changed:
            if address not in self._live:
                return
            self._live = MappingProxyType(
                {node: size for node, size in self._live.items() if node != address}
            )
            self._reasons[address] = reason
            self._attempts[address] = _Attempt(time.monotonic() + _FIRST_RETRY_S, _FIRST_RETRY_S)
            self._changed.notify_all()
        logger.warning("PolarKV: memory node %s is out: %s", address, reason)

    def close(self) -> None:
        """Stop the connector; the lanes are closed by their owner after this."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=3 * self._deadline_s + 1)

    def _connect_forever(self) -> None:
        while (address := self._next_due()) is not None:
            try:
                capacity = self._link(address)
            except PolarError as error:
                self._failed(address, error)
            else:
                self._up(address, capacity)

    def _next_due(self) -> str | None:
        """The node to try next, once it is due; None when closing."""
        with self._changed:
            while not self._closing:
                waiting = [
                    (self._attempts[node].due, node) for node in self.addresses if node not in self._live
                ]
                now = time.monotonic()
                if waiting and min(waiting)[0] <= now:
                    return min(waiting)[1]
                self._changed.wait(min(waiting)[0] - now if waiting else None)
            return None

    def _link(self, address: str) -> int:
        """Link all lanes to a node; its capacity in bytes."""
        controls: list[ControlConnection] = []
        try:
            for _ in self._lanes:
                controls.append(
                    ControlConnection.connect(
                        address,
                        token=self._token,
                        role="rank",
                        client=self._client,
                        deadline_s=self._deadline_s,
                    )
                )
            if len({control.welcome.node_id for control in controls}) > 1:
                raise NodeError(f"memory node {address} restarted while we connected")
            for lane, control in zip(self._lanes, controls):
                lane.add(address, control, self._deadline_s)
        except PolarError:
            for control in controls:
                control.close()
            raise
        return controls[0].welcome.capacity_bytes

    def _up(self, address: str, capacity: int) -> None:
        with self._changed:
            self._live = MappingProxyType({**self._live, address: capacity})
            self._reasons.pop(address, None)
            self._tried.add(address)
            self._changed.notify_all()
        logger.info("PolarKV: memory node %s is in use", address)

    def _failed(self, address: str, error: PolarError) -> None:
        with self._changed:
            known = self._reasons.get(address) == str(error)
            self._reasons[address] = str(error)
            wait_s = min(2 * self._attempts[address].wait_s, _LAST_RETRY_S)
            if isinstance(error, NodeRefused):
                wait_s = _LAST_RETRY_S
            self._attempts[address] = _Attempt(time.monotonic() + wait_s, wait_s)
            self._tried.add(address)
            self._changed.notify_all()
        if not known:
            logger.warning("PolarKV: memory node %s cannot be used, KV stays local: %s", address, error)
