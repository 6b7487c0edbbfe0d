"""Which memory nodes a rank can use now; connecting and watching happen off the hot path."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from polarkv_sglang.errors import NodeError, PolarError
from polarkv_sglang.pool.link import Lane
from polarkv_sglang.pool.nodes import NodeList
from polarkv_sglang.pool.trial import Trials
from polarkv_sglang.transport.control import ControlConnection, NodeRefused
from polarkv_sglang.transport.messages import Peek, View

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 2.0  # between two looks at a node that is in use, and at the list of nodes
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 10.0
_REASON_CHARACTERS = 512


class _Due(NamedTuple):
    """When a node is tried or looked at next."""

    at: float  # time.monotonic
    wait_s: float


class Membership:
    """The memory nodes that answer, as this rank sees them.

    A node that fails once on any lane is out on all of them, at once: that is the circuit breaker. It
    costs its batch at most one deadline and the batches after it nothing. The connector thread tries
    it again, ever less often, and brings it back when all lanes are linked. It also looks at the nodes in
    use, so that one that froze is out before a batch needs it, reports to them which nodes are out,
    and follows the list of nodes. Ranks may see different nodes for a while: they then look for a stripe in
    different places, which is a miss.
    """

    def __init__(
        self,
        nodes: NodeList,
        lanes: Sequence[Lane],
        trials: Trials,
        *,
        token: str | None,
        tls: ssl.SSLContext | None,
        client: str,
        deadline_s: float,
    ) -> None:
        """A node is linked to the lanes once it was reached in a trial, which holds up nobody."""
        self._nodes = nodes
        self._lanes = tuple(lanes)
        self._trials = trials
        self._token = token
        self._tls = tls
        self._client = client
        self._deadline_s = deadline_s
        self._live: Mapping[str, int] = MappingProxyType({})
        self._reasons: dict[str, str] = {}
        self._due = {address: _Due(0.0, _FIRST_RETRY_S) for address in nodes.addresses}
        self._watches: dict[str, ControlConnection] = {}  # of live nodes; the connector's alone
        self._changed = threading.Condition()
        self._closing = False
        self._tried: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="polarkv-connect", daemon=True)
        self._thread.start()

    @property
    def live(self) -> Mapping[str, int]:
        """Address -> capacity in bytes of the nodes that can be used; replaced, never changed."""
        return self._live

    def wait_tried(self, timeout_s: float) -> bool:
        """Whether every node was connected to or given up on once within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._tried.issuperset(self._due), timeout_s)

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
            self._due[address] = _Due(time.monotonic() + _FIRST_RETRY_S, _FIRST_RETRY_S)
            self._changed.notify_all()
        logger.warning("PolarKV: memory node %s is out: %s", address, reason)

    def close(self) -> None:
        """Stop the connector; the lanes are closed by their owner after this.

        It may be slow to end, but begins no step any more, and one that uses a lane takes less than we wait.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=4 * self._deadline_s + 1)

    def _run(self) -> None:
        reload_at = time.monotonic() + WATCH_INTERVAL_S
        while (address := self._next(reload_at)) is not None:
            try:
                if address == "":
                    reload_at = time.monotonic() + WATCH_INTERVAL_S
                    self._follow_list()
                elif address in self._live:
                    self._watch(address)
                else:
                    self._try(address)
            except Exception:  # without this thread no node would ever come back
                logger.exception("PolarKV: a look at memory node %s failed", address)
                self._postpone(address)
        for watch in self._watches.values():
            watch.close()

    def _next(self, reload_at: float) -> str | None:
        """The node to try or watch, once it is due; "" to look at the list, None when closing."""
        with self._changed:
            while not self._closing:
                at, address = min([(due.at, node) for node, due in self._due.items()] + [(reload_at, "")])
                now = time.monotonic()
                if at <= now:
                    return address
                self._changed.wait(at - now)
            return None

    def _postpone(self, address: str) -> None:
        with self._changed:
            if address in self._due:
                self._due[address] = _Due(time.monotonic() + _LAST_RETRY_S, _LAST_RETRY_S)
                self._tried.add(address)
                self._changed.notify_all()

    def _try(self, address: str) -> None:
        # What other lanes still hold of it: a mapping would keep a dead node's memory.
        self._drop(address)
        try:
            capacity = self._link(address)
        except PolarError as error:
            self._failed(address, error)
        else:
            self._up(address, capacity)

    def _link(self, address: str) -> int:
        """Link all lanes to a node; its capacity in bytes."""
        controls: list[ControlConnection] = []
        try:
            for _ in range(len(self._lanes) + 1):
                self._go_on()
                controls.append(
                    ControlConnection.connect(
                        address,
                        token=self._token,
                        tls=self._tls,
                        role="rank",
                        client=self._client,
                        deadline_s=self._deadline_s,
                    )
                )
            if len({control.welcome.node_id for control in controls}) > 1:
                raise NodeError(f"memory node {address} restarted while we connected")
            self._go_on()
            self._trials.reach(controls[0].welcome, self._deadline_s)
            for lane, control in zip(self._lanes, controls):
                self._go_on()
                lane.add(address, control, self._deadline_s)
        except PolarError:
            for control in controls:
                control.close()
            raise
        self._unwatch(address)
        self._watches[address] = controls[-1]
        return controls[0].welcome.capacity_bytes

    def _go_on(self) -> None:
        """NodeError once we are closing: soon there are neither lanes nor contexts."""
        if self._closing:
            raise NodeError("closing")

    def _watch(self, address: str) -> None:
        """See whether a node in use still answers, and tell it which ones do not."""
        if any(address not in lane.links for lane in self._lanes):
            self.down(address, "a lane has lost its link to it")  # beside the failure of another node
            return
        watch = self._watches[address]
        out = {node: reason[:_REASON_CHARACTERS] for node, reason in self.reasons().items()}
        try:
            watch.send(View(out), self._deadline_s)
            watch.request(Peek(watch.next_id(), b""), self._deadline_s)
        except NodeError as error:
            self.down(address, str(error))
            return
        with self._changed:
            if address in self._live:
                self._due[address] = _Due(time.monotonic() + WATCH_INTERVAL_S, _FIRST_RETRY_S)

    def _drop(self, address: str) -> None:
        for lane in self._lanes:
            with lane.lock:
                lane.drop(address)

    def _unwatch(self, address: str) -> None:
        watch = self._watches.pop(address, None)
        if watch is not None:
            watch.close()

    def _follow_list(self) -> None:
        if not self._nodes.reload():
            return
        listed = self._nodes.addresses
        with self._changed:
            gone = [address for address in self._due if address not in listed]
            for address in gone:
                del self._due[address]
                self._reasons.pop(address, None)
            for address in listed:
                self._due.setdefault(address, _Due(0.0, _FIRST_RETRY_S))
            self._live = MappingProxyType(
                {node: size for node, size in self._live.items() if node in self._due}
            )
            self._changed.notify_all()
        for address in gone:
            self._drop(address)
            self._unwatch(address)
        logger.info("PolarKV: the memory nodes are now %s", ", ".join(listed) or "none")

    def _up(self, address: str, capacity: int) -> None:
        with self._changed:
            self._live = MappingProxyType({**self._live, address: capacity})
            self._reasons.pop(address, None)
            self._due[address] = _Due(time.monotonic() + WATCH_INTERVAL_S, _FIRST_RETRY_S)
            self._tried.add(address)
            self._changed.notify_all()
        logger.info("PolarKV: memory node %s is in use", address)

    def _failed(self, address: str, error: PolarError) -> None:
        with self._changed:
            if self._closing:
                return
            known = self._reasons.get(address) == str(error)
            self._reasons[address] = str(error)
            wait_s = min(2 * self._due[address].wait_s, _LAST_RETRY_S)
            if isinstance(error, NodeRefused):
                wait_s = _LAST_RETRY_S
            self._due[address] = _Due(time.monotonic() + wait_s, wait_s)
            self._tried.add(address)
            self._changed.notify_all()
        if not known:
            logger.warning("PolarKV: memory node %s cannot be used, KV stays local: %s", address, error)
