"""PolarRadixCache: SGLang's radix cache, with evicted nodes spilling to the pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.unified_cache.cache_action import BackupKV
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_hash_str

from polarkv_sglang.radix.fetches import Fetches
from polarkv_sglang.radix.giving_way import GivingWay
from polarkv_sglang.radix.policy import CostPolicy, Decision, NodeView, SpillPolicy
from polarkv_sglang.radix.rates import RateMeter
from polarkv_sglang.runtime import PolarRuntime, current_runtime

if TYPE_CHECKING:
    from sglang.srt.managers.cache_controller import PrefetchOperation
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_radix_cache import CacheRequestHandle
    from sglang.srt.server_args import ServerArgs

    from polarkv_sglang.blend.blender import Blender

logger = logging.getLogger(__name__)

# Scheduler steps between two agreements of the ranks on measured rates.
_AGREE_STEPS = 256
# Tokens that are spilled ahead in one scheduler step: keeps the step short.
_SPILL_AHEAD_TOKENS = 8192
_ALL_TOKENS = 1 << 60
_WATERMARK_STEPS = 16
_DRAIN_POLL_S = 0.001
_DRAIN_STEPS = 10_000


class PolarRadixCache(UnifiedRadixCache):
    """SGLang's UnifiedRadixCache with the pool as its third tier.

    Follows SGLang 0.5.23, ``mem_cache/unified_radix_cache.py``. What is spilled, kept or dropped is a
    policy's decision; how is here. Under HiCache's write-through policies (spill mode ``share``) nodes
    reach the pool as they are inserted. Under write-back (spill mode ``evict``) they reach it when they
    leave L1, and cold ones are copied ahead of need, so that no allocation waits for a copy.

    All methods are called by the scheduler thread. Whatever decides about tree nodes uses only what is
    equal on all ranks: the tree, free tokens, and rates the ranks have agreed on.
    """

    def __init__(
        self,
        params: CacheInitParams,
        *,
        runtime: PolarRuntime | None = None,
        policy: SpillPolicy | None = None,
    ) -> None:
        """As SGLang's factory calls it; ``runtime`` defaults to this process's, ``policy`` to CostPolicy."""
        self.runtime = runtime or current_runtime()
        self.policy = policy or CostPolicy()
        self.rates = RateMeter()
        self.blender: Blender | None = None  # None: CacheBlend is off
        self._steps = 0
        self.giving_way = GivingWay()
        self.fetches = Fetches(lambda: self.cache_controller.prefetch_capacity_limit)
        self._fetches_in_turn = False  # set where a scheduler tells who is admitted
        self._inserts = 0
        self._inserts_at_reset = 0
        self._nothing_cold = (-1, 0)  # inserts and least free tokens at which nothing is left to copy ahead
        self.runtime.kv_dtype = str(params.token_to_kv_pool_allocator.get_kvcache().dtype)
        # SGLang compiles its page hash where it is first used: in a storage thread, half a minute on a fresh
        # machine, and a flush that has to wait above 10 s for such a thread ends the engine.
        get_hash_str([0])
        super().__init__(params)

    # Weight updates

    @property
    def is_clean(self) -> bool:
        """Whether no KV was put into the tree since it was emptied, and none is on its way."""
        return self._inserts == self._inserts_at_reset and not self.ongoing_prefetch

    @property
    def inserts(self) -> int:
        """How often KV was put into the tree."""
        return self._inserts

    def reset(self) -> None:
        # Storage threads are joined in there, within a time that a backlog for a slow pool would exceed.
        with self.runtime.weights.paused():
            super().reset()
        self.fetches.clear()
        self.storage_prefetch_retries = self.fetches
        self._inserts_at_reset = self._inserts
        if self.blender is not None:
            self.blender.forget()
        self.runtime.weights.adopt()

    def insert(self, params: InsertParams) -> InsertResult:
        self._inserts += 1
        result = super().insert(params)
        if self.blender is not None:
            self.blender.learn(params.key)
        return result

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        if self.blender is not None:
            self.blender.release(req)
        super().on_release(req, checkpointed=checkpointed)

    def _handle_prefetch_result(self, operation: PrefetchOperation) -> None:
        self._inserts += 1
        super()._handle_prefetch_result(operation)

    def drain_storage(self) -> None:
        """End all transfers, so that a flush can follow; the weights guard is suspended, so queued ones miss.

        Ends after the same number of steps on all ranks: it follows queues whose lengths the ranks agree on.
        """
        if self.cache_controller is None:
            return
        for ongoing in self.ongoing_prefetch.values():
            self.cache_controller.terminate_prefetch(ongoing.operation)
        for _ in range(_DRAIN_STEPS):
            if not self.ongoing_backup and not self.ongoing_write_through:
                return
            super().check_hicache_events()  # ours would go on spilling
            time.sleep(_DRAIN_POLL_S)
        logger.warning(
            "PolarKV: %d writes to the pool did not end and are left behind", len(self.ongoing_backup)
        )

    # Fetching

    def init_hicache(self, server_args: ServerArgs, params: CacheInitParams) -> None:
        super().init_hicache(server_args, params)
        # Disaggregated engines have queues of their own, pipelines agree on fetches in another way, and where
        # L2 is a buffer SGLang lets fetches wait.
        self._fetches_in_turn = (
            server_args.disaggregation_mode == "null"
            and server_args.pp_size == 1
            and self.host_memory_mode == "cache"
        )

    def prefetch_from_storage(
        self,
        request: CacheRequestHandle,
        last_host_node_id: int,
        new_input_tokens: Sequence[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
        storage_hit_end: int | None = None,
        **more: object,
    ) -> bool:
        """Fetch the pages that follow ``last_host_node_id``, which is told with all pages before them.

        Where L2 has no room for them beside those of other requests in the queue, they wait for it.
        SGLang 0.5.23 gives the pages of the node's ancestors and leaves out its own. Counted from there, the
        new pages would be looked for on other memory nodes than those that have them.
        """
        if prefix_keys is not None:
            prefix_keys = [*prefix_keys, *self.tree_core.get_hash_values(last_host_node_id)]
        tokens = len(new_input_tokens)
        in_turn = self._fetches_in_turn and self.enable_storage and tokens >= self.prefetch_threshold
        if in_turn and not self.fetches.may_begin(request.rid, tokens):
            self.fetches.wait(request.rid, tokens, storage_hit_end)
            return False
        begun = super().prefetch_from_storage(
            request,
            last_host_node_id,
            new_input_tokens,
            last_hash,
            prefix_keys,
            storage_hit_end=storage_hit_end,
            **more,
        )
        if in_turn and request in self.ongoing_prefetch:
            self.fetches.hold(request.rid, tokens)
        return bool(begun)

    def check_prefetch_progress(self, request: CacheRequestHandle) -> bool:
        """Whether a request's fetch has ended; while it has not, lets the threads that fetch have the GIL."""
        ready = not self.fetches.is_waiting(request.rid) and bool(super().check_prefetch_progress(request))
        if not ready:
            self.giving_way.give_way()
        return ready

    # Spilling

    def write_backup_storage(self, node_id: int) -> None:
        """Write a node that has reached L2 to the pool, if the policy wants it there."""
        if self._decide(node_id) is Decision.SPILL:
            super().write_backup_storage(node_id)

    def _evict_device_leaf(self, node_id: int, tracker: dict[ComponentType, int]) -> BackupKV | None:
        if (
            self.is_write_back
            and not self.is_backuped(node_id)
            and self._decide(node_id) is Decision.DROP
            and self._drop_subtree_no_host(node_id, tracker)
        ):
            return None
        return super()._evict_device_leaf(node_id, tracker)

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        if self.cache_controller is None:
            return
        self._steps += 1
        if self._steps % _AGREE_STEPS == 0 and self.enable_storage:
            pool = self.runtime.client.statistics()
            self.rates.observe_pool(pool.got_bytes, pool.get_s)
            self.rates.agree(
                lambda values: self._all_reduce(values, torch.distributed.ReduceOp.MIN),
                self.cache_controller.mem_pool_host.size_per_token,
            )
        if self.is_write_back:
            self._spill_ahead()

    def loading_check(self, finish_count: int | None = None) -> None:
        waiting = list(self.cache_controller.ack_load_queue) if self.cache_controller is not None else []
        super().loading_check(finish_count)
        for ack in waiting[: len(waiting) - len(self.cache_controller.ack_load_queue)] if waiting else ():
            if ack.timing_enabled:
                self.rates.observe_load(ack.num_bytes, ack.start_event.elapsed_time(ack.finish_event) / 1e3)

    def _spill_ahead(self) -> None:
        """Copy cold nodes to L2, and so to the pool, until the watermark of L1 could be evicted at once."""
        free = self.token_to_kv_pool_allocator.available_size()
        wanted_in_all = int(self.runtime.config.spill_watermark * self.token_to_kv_pool_allocator.size)
        wanted = wanted_in_all - free
        inserts, least_free = self._nothing_cold
        if wanted <= 0 or (inserts == self._inserts and free >= least_free):
            return
        chosen, budget = [], _SPILL_AHEAD_TOKENS
        for node_id, tokens in self._cold_nodes():
            if wanted <= 0 or budget <= 0:
                break
            wanted -= tokens
            if self.is_backuped(node_id) or node_id in self.ongoing_write_through:
                continue
            if self._decide(node_id) is Decision.SPILL:
                chosen.append(node_id)
                budget -= tokens
        for node_id in chosen:
            if self._execute_and_commit_kv_backup(BackupKV([node_id])) == 0:
                break  # no room in L2 that could be freed now
        if chosen:
            self.flush_pending_backups()
        else:
            # What the decoding requests take page by page is made up for in steps, not page by page.
            self._nothing_cold = (self._inserts, free - wanted_in_all // _WATERMARK_STEPS)

    def _cold_nodes(self) -> Iterator[tuple[int, int]]:
        """Nodes and their tokens in the order of eviction: the coldest leaf, its ancestors, the next leaf.

        Nothing may be evicted until the generator is closed.
        """
        seen: set[int] = set()
        for leaf in self._cold_leaves():
            for node in reversed(self.tree_core.collect_path_info([leaf])[0]):
                if node.node_id in seen or not node.full_value_len:
                    continue
                seen.add(node.node_id)
                yield node.node_id, node.full_value_len

    def _cold_leaves(self) -> Iterator[int]:
        """Device leaves, coldest first; the walk changes nothing as long as no leaf is evicted."""
        tracker = dict.fromkeys(self.tree_components, 0)
        self.tree_core.evict_device_start(ComponentType.FULL, _ALL_TOKENS)
        try:
            while (
                leaf := self.tree_core.evict_device_next_node(ComponentType.FULL, tracker).node_id
            ) is not None:
                yield leaf
        finally:
            self.tree_core.evict_device_end(ComponentType.FULL)

    def _decide(self, node_id: int) -> Decision:
        node = self.tree_core.collect_path_info([node_id])[0][-1]
        tokens = node.path_end - node.path_start
        return self.policy.decide(NodeView(tokens, tokens * self.rates.bytes_per_token), self.rates.agreed)
