"""DirectRadixCache: the radix cache of direct mode, L1 <-> pool through a linker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.cache_action import BackupKV
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
)

from polarkv_sglang.hicache.linker import PolarLinker
from polarkv_sglang.radix.cache import PolarRadixCache
from polarkv_sglang.radix.recompute import Recompute
from polarkv_sglang.runtime import PolarRuntime

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

# After which a request is computed without asking the pool.
_MOST_FAILURES = 2
# That a scheduling pass gives new lookups in all: most are done by then, and their requests join its batch.
_PATIENCE_S = 2e-3
# Share of L1 that is locked by writes to the pool when no more are begun; the KV then stays local.
_MOST_PENDING = 0.5


class DirectRadixCache(PolarRadixCache):
    """PolarRadixCache without a host tier.

    Nodes are written to the pool as they are inserted, straight from L1; hits come straight into slots of
    the request that asked. ``linker`` is made by SGLang's factory through ``init_cache_linker``.
    """

    linker: PolarLinkerWrapper | None

    def __init__(self, params: CacheInitParams, *, runtime: PolarRuntime | None = None) -> None:
        super().__init__(params, runtime=runtime)
        self.recompute = Recompute()

    def init_cache_linker(self, cache_linker: UnifiedCacheLinker) -> None:
        assert isinstance(cache_linker, PolarLinker)
        self.linker = PolarLinkerWrapper(self, cache_linker)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, int] | None:
        """Queue a load; what it brings is attributed to the pool, not to host memory."""
        if params.req is not None:
            params.req.host_hit_is_storage = True
        loaded: tuple[int, int] | None = super().init_load_back(params)
        return loaded

    def finish_external_linker_loads(self, reqs: list[Req]) -> list[Req]:
        """Wait for the loads of the batch that just ran; those whose KV is missing are computed again."""
        if self.linker is None:
            return []
        lost = set(self.linker.finish_loads())
        failed = [request for request in reqs if request.rid in lost or self.linker.tainted]
        for request in failed:
            if request.rid in lost:
                self.linker.failures[request] = self.linker.failures.get(request, 0) + 1
            self.recompute.mark(request)
        return failed

    def look_up(self, waiting: Sequence[Req]) -> list[Req]:
        """Have the pool asked for requests that wait; those whose answer is still to come."""
        return [] if self.linker is None else self.linker.look_up(waiting)

    def _evict_device_leaf(self, node_id: int, tracker: dict[ComponentType, int]) -> BackupKV | None:
        if self.linker is not None:
            self.linker.evicted.add(node_id)
        return super()._evict_device_leaf(node_id, tracker)

    def drain_storage(self) -> None:
        """End all writes, so that a flush can follow; the weights guard is suspended, so no new ones come."""
        if self.linker is not None:
            self.linker.cache_linker.drop_offloads()


def in_order(queued: Sequence[Req], left: Sequence[Req]) -> list[Req]:
    """What is left of a queue as it was queued; what has come since (preempted requests) is last."""
    places = {id(request): place for place, request in enumerate(queued)}
    return sorted(left, key=lambda request: places.get(id(request), len(queued)))


class _Waiting(NamedTuple):
    """A request in the queue, for which the pool was asked."""

    node: int  # of the tree: the last one of its prefix in L1; the pool was asked for what follows
    known: bool  # whether all ranks know what the pool has


class PolarLinkerWrapper(UnifiedCacheLinkerWrapper):
    """SGLang's flow around a linker, telling it each page's place in its prefix.

    Called by the scheduler thread, alike on all ranks.
    """

    cache: DirectRadixCache
    cache_linker: PolarLinker
    inflight_load_rids: list[str]
    inflight_load_index: int

    def __init__(self, cache: DirectRadixCache, cache_linker: PolarLinker) -> None:
        super().__init__(cache, cache_linker)
        self.failures: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self.tainted = False  # whether what the last pass computed is to be dropped for all of its requests
        self._most_pending = int(_MOST_PENDING * cache.token_to_kv_pool_allocator.size)
        self._pending_tokens: list[int] = []  # of ``pending_offloads``
        self.evicted: set[int] = set()  # nodes that have left L1 since lookups were last started
        self._waiting: dict[str, _Waiting] = {}
        self._beginning = False

    def look_up(self, waiting: Sequence[Req]) -> list[Req]:
        """Start lookups of requests that are new in the queue, or have lost some of their prefix in L1; those
        of which the answer is still to come.

        The scheduler leaves these in the queue: it never waits long for a memory node. Their KV in the pool
        is kept until they are loaded or leave the queue. Called once, at the start of a scheduling pass.
        """
        lookups = self.cache_linker.lookups
        lookups.patience_s = _PATIENCE_S
        rids = {request.rid for request in waiting}
        lookups.keep_only(rids)
        self._waiting = {rid: state for rid, state in self._waiting.items() if rid in rids}
        # Leaves go first, so a prefix that has lost anything has lost its last node.
        evicted, self.evicted = self.evicted, set()
        begun = [
            request
            for request in waiting
            if request.rid not in self._waiting or self._waiting[request.rid].node in evicted
        ]
        for request in begun:
            self._begin(request)
        pending = [request for request in waiting if not self._waiting[request.rid].known]
        if not pending:
            return []
        if begun:
            lookups.wait([request.rid for request in pending])
        else:
            self.cache.giving_way.give_way()
        found = [lookups.find(request.rid) for request in pending]
        done = torch.tensor([each is None or each.done or each.overdue for each in found], dtype=torch.int)
        self.cache._all_reduce_attn_groups(done, torch.distributed.ReduceOp.MIN)
        for request, known in zip(pending, done.tolist(), strict=True):
            self._waiting[request.rid] = self._waiting[request.rid]._replace(known=bool(known))
        return [request for request in pending if not self._waiting[request.rid].known]

    def _begin(self, request: Req) -> None:
        """Have the pool asked for what follows a request's prefix in L1, if anything may be there."""
        lookups = self.cache_linker.lookups
        lookups.drop(request.rid)
        self._beginning = True
        try:
            request.init_next_round_input(self.cache)
        finally:
            self._beginning = False
        asked = lookups.find(request.rid) is not None
        self._waiting[request.rid] = _Waiting(request.last_node, known=not asked)

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        if self.failures.get(req, 0) >= _MOST_FAILURES:
            return result
        if self._beginning:
            hashes = self._tail_hashes(key, result, result.device_prefix_len)
            if hashes:
                self.cache_linker.begin_lookup(req.rid, hashes)
            return result
        matched: MatchResult = super().match(key, req, result)
        return matched

    def load_back(self, req: Req) -> tuple[int, int]:
        self._waiting.pop(req.rid, None)  # if it comes back it is looked up again
        loaded: tuple[int, int] = super().load_back(req)
        return loaded

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        self.cache_linker.lookups.drop(rid)

    def reset(self) -> None:
        super().reset()
        self.evicted.clear()
        self._waiting.clear()  # requests that wait are looked up again

    def _tail_hashes(self, key: RadixKey, result: MatchResult, device_hit_len: int) -> list[str]:
        hashes: list[str] = super()._tail_hashes(key, result, device_hit_len)
        if not hashes:
            return []
        prefix: list[str] = []
        if device_hit_len:
            node, core = result.last_device_node, self.cache.tree_core
            prefix = core.get_prefix_hash_values(node) + core.get_hash_values(node)
        if len(prefix) * self.cache.page_size != device_hit_len:
            return []  # where the tail belongs in its prefix is not known
        self.cache_linker.prefix = prefix
        return hashes

    def finish_loads(self) -> list[str]:
        """Wait for the loads of the batch that just ran; the requests whose KV did not land on all ranks."""
        rids, self.inflight_load_rids = self.inflight_load_rids, []
        self.tainted = False
        if not rids:
            return []
        index, self.inflight_load_index = self.inflight_load_index, -1
        outcome = self.cache_linker.finish(index)
        right = [not outcome.tainted, *(outcome.requests.get(rid, False) for rid in rids)]
        landed = torch.tensor(right, dtype=torch.int)
        self.cache._all_reduce_attn_groups(landed, torch.distributed.ReduceOp.MIN)
        for rid in rids:
            self.private_load_indices.pop(rid, None)
        clean, *arrived = landed.tolist()
        self.tainted = not clean
        lost = [rid for rid, here in zip(rids, arrived, strict=True) if not here]
        if lost:
            rest = "" if clean else ", and so is the rest of their pass, which has used layers of it"
            logger.warning(
                "PolarKV: KV of %d of %d requests did not arrive; they are computed%s",
                len(lost),
                len(rids),
                rest,
            )
        return lost

    def _offload_node(self, node_id: int, transfers: list[PoolTransfer]) -> None:
        tokens = len(transfers[0].device_indices)
        del self._pending_tokens[: len(self._pending_tokens) - len(self.pending_offloads)]
        if sum(self._pending_tokens) > self._most_pending:
            return  # a node is locked until it is written; requests need the room more
        core = self.cache.tree_core
        prefix = core.get_prefix_hash_values(node_id)
        if len(prefix) * self.cache.page_size != core.collect_path_info([node_id])[0][-1].path_start:
            return
        self.cache_linker.prefix = prefix
        super()._offload_node(node_id, transfers)
        if len(self.pending_offloads) > len(self._pending_tokens):
            self._pending_tokens.append(tokens)
