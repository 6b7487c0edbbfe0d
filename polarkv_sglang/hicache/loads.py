"""What the linker of direct mode has under way: plans of requests, loads of batches, offloads."""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import Final, NamedTuple

import torch

from polarkv_sglang.pool.blocks import Chain

# After which a lookup is made again: what was evicted meanwhile is better known before a load than in it.
_PLAN_S: Final = 5.0
_MOST_PLANS: Final = 4096


class Plan(NamedTuple):
    """What a lookup found for one request."""

    digest: bytes  # of the namespace that the blocks are named in
    hashes: list[str]  # of the pages asked for, heads first
    chain: Chain
    hits: int  # of them, how many at the head are in the pool
    made: float  # time.monotonic

    def position(self, page_hash: str) -> int | None:
        """Where a page is in the plan; None if it is not."""
        # A page hash covers all pages before it, so no two pages of a plan have the same.
        return self.hashes.index(page_hash) if page_hash in self.hashes else None


class Plans:
    """The plans of waiting requests, as long as they are fresh. Losing one costs a lookup."""

    def __init__(self) -> None:
        self._plans: OrderedDict[str, Plan] = OrderedDict()

    def find(self, rid: str, digest: bytes) -> Plan | None:
        """The plan of a request, if it is fresh and its names are still right."""
        plan = self._plans.get(rid)
        return plan if plan is not None and plan.digest == digest and _fresh(plan) else None

    def keep(self, rid: str, plan: Plan) -> None:
        self._plans.pop(rid, None)
        while self._plans and not _fresh(next(iter(self._plans.values()))):
            self._plans.popitem(last=False)
        self._plans[rid] = plan
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)

    def take(self, rid: str) -> Plan | None:
        return self._plans.pop(rid, None)

    def clear(self) -> None:
        self._plans.clear()

    def __len__(self) -> int:
        return len(self._plans)


def _fresh(plan: Plan) -> bool:
    return time.monotonic() - plan.made <= _PLAN_S


class Load(NamedTuple):
    """Blocks that one request is waiting for."""

    rid: str
    chain: Chain
    starts: torch.Tensor  # first slots of their pages, int64 [blocks] on the CPU


class Landed(NamedTuple):
    """How the loads of one forward pass ended."""

    requests: dict[str, bool]  # whether all of their blocks are in L1 and right
    tainted: bool  # whether the pass may have computed with bytes that turned out to be wrong


class Batch(NamedTuple):
    """The loads of one forward pass."""

    number: int  # the load counter's
    loads: list[Load]
    ready: list[torch.cuda.Event]  # nothing uses what the slots held before once these have passed
    landed: Future[Landed]


class Offload(NamedTuple):
    """Blocks of one tree node on their way to the pool."""

    epoch: int
    chain: Chain
    starts: torch.Tensor
    ready: list[torch.cuda.Event]  # L1 holds the KV once these have passed
