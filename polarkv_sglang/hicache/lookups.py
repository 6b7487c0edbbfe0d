"""What the pool has for requests that wait: looked up, and kept there, off the scheduler's thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from queue import Empty, Queue
from typing import Final, NamedTuple

from polarkv_sglang.pool.blocks import Chain
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.pool.finder import NOTHING_KEPT

logger = logging.getLogger(__name__)

# How long memory nodes keep what was found, if nobody renews it any more: as long as blocks outlive an engine
# that crashed.
LEASE_S: Final = 10.0
_RENEW_S: Final = LEASE_S / 3


class Plan(NamedTuple):
    """What a lookup found for one request."""

    digest: bytes  # of the namespace that the blocks are named in
    hashes: list[str]  # of the pages asked for, heads first
    chain: Chain
    hits: int  # of them, how many at the head are in the pool

    def position(self, page_hash: str) -> int | None:
        """Where a page is in the plan; None if it is not."""
        # A page hash covers all pages before it, so no two pages of a plan have the same.
        return self.hashes.index(page_hash) if page_hash in self.hashes else None


class Lookup:
    """One request's, from ``Lookups``."""

    def __init__(self, plan: Plan, deadline_s: float) -> None:
        self.plan = plan  # without hits until it is done
        self._until = time.monotonic() + deadline_s
        self._done = threading.Event()
        self._kept = NOTHING_KEPT  # the thread's
        self._over = False  # under the lock

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def overdue(self) -> bool:
        """Its request has waited for long enough: what is not known by now counts as a miss.

        The thread asks for one request after another, so its answer may come much later than a deadline.
        """
        return time.monotonic() > self._until


class Lookups:
    """Lookups by request, each with leases on what it found until its request has read it or goes.

    A thread asks the pool, renews the leases of requests that wait, and lets go of those that are over; a
    memory node bounds what such leases keep. What is not kept is looked for again as often. The scheduler
    thread calls everything but ``end``, which any thread may call; it never waits longer than ``patience_s``.
    """

    def __init__(self, client: PoolClient) -> None:
        self._client = client
        # For which ``wait`` still waits, all calls together: set for each scheduling pass.
        self.patience_s = 0.0
        self._lookups: dict[str, Lookup] = {}  # the scheduler thread's
        self._lock = threading.Lock()  # over ``Lookup._over``
        self._due: deque[tuple[float, Lookup]] = deque()  # the thread's: when each is renewed next
        self._work: Queue[Lookup | None] = Queue()  # begun, or over; None: close
        self._thread = threading.Thread(target=self._run, name="polarkv-lookups", daemon=True)
        self._thread.start()

    def begin(self, rid: str, digest: bytes, hashes: list[str], chain: Chain) -> Lookup:
        """Have a request's blocks looked up; what it had before is over."""
        self.drop(rid)
        lookup = self._lookups[rid] = Lookup(Plan(digest, hashes, chain, 0), self._client.deadline_s)
        self._work.put(lookup)
        return lookup

    def wait(self, rids: Iterable[str]) -> None:
        """Until the lookups of these requests are done, or ``patience_s`` is used up."""
        until = time.monotonic() + self.patience_s
        for rid in rids:
            if rid in self._lookups:
                self._lookups[rid]._done.wait(self.patience_s)
                self.patience_s = max(0.0, until - time.monotonic())

    def find(self, rid: str) -> Lookup | None:
        return self._lookups.get(rid)

    def take(self, rid: str) -> Lookup | None:
        """A request's lookup, which is over when its taker says so by ``end``."""
        return self._lookups.pop(rid, None)

    def drop(self, rid: str) -> None:
        """A request needs nothing of the pool any more; harmless if it has no lookup."""
        lookup = self._lookups.pop(rid, None)
        if lookup is not None:
            self.end(lookup)

    def keep_only(self, rids: AbstractSet[str]) -> None:
        """Drop the lookups of all other requests."""
        for rid in self._lookups.keys() - rids:
            self.drop(rid)

    def end(self, lookup: Lookup) -> None:
        """Nobody will read what was found."""
        with self._lock:
            lookup._over = True
        self._work.put(lookup)

    def close(self) -> None:
        """End all, and the thread: at most about a deadline later."""
        self.keep_only(frozenset())
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            wait_s = self._due[0][0] - time.monotonic() if self._due else None
            # What is due comes first: however many requests come, none that waits loses its leases.
            if wait_s is not None and wait_s <= 0:
                self._attend(self._due.popleft()[1])
                continue
            try:
                lookup = self._work.get(timeout=wait_s)
            except Empty:
                continue
            if lookup is None:
                return
            self._attend(lookup)

    def _attend(self, lookup: Lookup) -> None:
        """What a lookup needs now: to be made, renewed, or ended."""
        try:
            if not self._is_over(lookup) and not self._renewed(lookup):
                self._find(lookup)
            if self._is_over(lookup):
                self._let_go(lookup)
            else:
                self._due.append((time.monotonic() + _RENEW_S, lookup))
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: a lookup in the pool failed and counts as a miss")
        finally:
            lookup._done.set()

    def _renewed(self, lookup: Lookup) -> bool:
        kept = lookup._kept
        return kept.whole and kept.blocks > 0 and self._client.renew(kept, LEASE_S)

    def _find(self, lookup: Lookup) -> None:
        kept = self._client.hold(lookup.plan.chain, LEASE_S)
        self._let_go(lookup)
        lookup._kept = kept
        lookup.plan = lookup.plan._replace(hits=kept.blocks)
        if not kept.blocks:
            self._let_go(lookup)  # what continues a head that is not there

    def _let_go(self, lookup: Lookup) -> None:
        kept, lookup._kept = lookup._kept, NOTHING_KEPT
        if kept.leases:
            self._client.drop(kept)

    def _is_over(self, lookup: Lookup) -> bool:
        with self._lock:
            return lookup._over
