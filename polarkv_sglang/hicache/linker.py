"""PolarLinker: SGLang's cache linker on the memory pool, L1 <-> L3."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.hicache.device_pools import device_pool
from polarkv_sglang.hicache.loader import Loader, parts
from polarkv_sglang.hicache.loads import Batch, Landed, Load, Offload, Plan, Plans
from polarkv_sglang.hicache.naming import BlockNames, RankPlace
from polarkv_sglang.hicache.staging import passage
from polarkv_sglang.pool.blocks import Chain
from polarkv_sglang.runtime import current_runtime

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class PolarLinker(UnifiedCacheLinker):
    """Pages of L1 as blocks of the memory pool, with no host tier between them.

    Follows SGLang 0.5.23, ``unified_cache/unified_cache_linker.py``. The scheduler thread calls all methods.
    Loads and offloads run on a thread each, over separate lanes of the pool client; every operation ends
    within about a deadline, and what goes wrong is a miss.

    Why no wrong token comes of it: a load writes into slots that only its request knows, and the outcome
    of a batch is known only after all of its blocks were checked as a whole. Where the pool can be read in
    parts, groups of layers are released to the forward pass as they arrive, before that check, which covers
    all layers. Whatever the pass computes for a request whose blocks are missing, late or wrong is dropped,
    and its slots are freed without reaching the tree (``radix/recompute.py``). Such bytes are often not
    numbers, and some models (activations quantised with one scale) let the rows of a pass influence each
    other: if layers had been released, the whole pass is dropped. If not, its pages are zeroed first.

    A block may be evicted between lookup and load: no lease is held in between, the load then misses it,
    and it is computed.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        *,
        components: Collection[ComponentType],
        extra_config: dict[str, object] | None = None,
        forward_stream: torch.cuda.Stream | None = None,
    ) -> None:
        """As SGLang's ``dynamic`` linker backend calls it.

        Raises ConfigError for a model whose KV is not plain MHA or MLA, TransportError if L1 cannot be
        registered.
        """
        if set(components) != {ComponentType.FULL}:
            names = ", ".join(sorted(component.name for component in components))
            raise ConfigError(
                f"--polarkv-mode direct: the model keeps {names} state, and only full attention is "
                "supported; use --polarkv-mode hicache"
            )
        self._runtime = current_runtime()
        self._client = self._runtime.client
        kv = params.token_to_kv_pool_allocator.get_kvcache()
        pool = device_pool(kv, params.page_size)
        self._pool = pool.paged
        self._place = _rank_place(params, pool.replicated)
        self._names = BlockNames(
            self._runtime,
            self._place,
            page_tokens=params.page_size,
            block_bytes=self._pool.block_bytes,
            layout=pool.layout,
        )
        self._loader = Loader(self._client, passage(self._pool, self._client))
        self._out = passage(self._pool, self._client)
        self.forward_stream = forward_stream if self._pool.device.type == "cuda" else None
        self.pools = {PoolName.KV: kv}
        self.layer_done_counter = LayerWiseLoadCounter(self._pool.layers)
        self.prefix: list[str] = []  # page hashes before those of the next lookup or offload
        self._plans = Plans()
        self._queued: dict[str, Load] = {}
        self._started: dict[int, Batch] = {}
        self._epoch = 0  # offloads of an earlier one are dropped
        self._offloaded: deque[bool] = deque()
        self._loads: Queue[Batch | None] = Queue()
        self._offloads: Queue[Offload | None] = Queue()
        self._threads = [
            Thread(target=target, name=f"polarkv-{target.__name__.strip('_')}", daemon=True)
            for target in (self._run_loads, self._run_offloads)
        ]
        for thread in self._threads:
            thread.start()

    # Looking up and loading

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every number of pages that could be restored; asks the pool once per request and few seconds.

        Blocks at most one deadline.
        """
        hashes = list(transfers[0].keys or ())
        digest = self._names.digest()
        if digest is None or not hashes:
            return []
        plan = self._plans.find(rid, digest)
        position = plan.position(hashes[0]) if plan is not None else None
        if plan is None or position is None:
            plan, position = self._plan(digest, hashes), 0
            self._plans.keep(rid, plan)
        return list(range(1, plan.hits - position + 1))

    def _plan(self, digest: bytes, hashes: list[str]) -> Plan:
        chain = self._names.chain(digest, self.prefix, hashes)
        try:
            hits = self._client.peek(chain)
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: a lookup in the pool failed and counts as a miss")
            hits = 0
        return Plan(digest, hashes, chain, hits, time.monotonic())

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue what ``lookup`` found into slots of the request; False if it was found under other names."""
        kv = transfers[0]
        plan = self._plans.take(rid)
        if plan is None or plan.digest != self._names.digest() or kv.device_indices is None:
            return False
        position = plan.position(kv.keys[0])
        if position is None:
            return False
        part = slice(position, position + len(kv.keys))
        chain = Chain(plan.chain.keys[part], plan.chain.parents[part], plan.chain.anchors[part])
        self._queued[rid] = Load(rid, chain, self._starts(kv.device_indices))
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        index: int = self.layer_done_counter.update_producer()
        self._started[index] = Batch(index, list(self._queued.values()), self._launched(), Future())
        self._queued = {}
        self._loads.put(self._started[index])
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return all(self.finish(counter_index).requests.values())

    def finish(self, index: int) -> Landed:
        """Wait for the batch started as ``index``."""
        batch = self._started.pop(index, None)
        if batch is None:
            return Landed({}, tainted=False)
        landed = batch.landed.result()
        self.layer_done_counter.finish(index)
        return landed

    def _run_loads(self) -> None:
        while (batch := self._loads.get()) is not None:
            batch.landed.set_result(self._land(batch))
            self._loads.task_done()

    def _land(self, batch: Batch) -> Landed:
        """Run the loads of a batch, with all layers released at the end whatever happens."""
        released = 0

        def release(up_to: int) -> None:
            nonlocal released
            while released < up_to:
                self.layer_done_counter.complete(batch.number, released)
                released += 1

        try:
            for event in batch.ready:
                event.synchronize()
            # A layer is ready when the last request has it.
            *others, last = batch.loads
            landed = {load.rid: self._loader.load(load.chain, load.starts) for load in others}
            landed[last.rid] = self._loader.load(last.chain, last.starts, release)
            tainted = released > 0 and not landed[last.rid]
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: the loads of a batch failed; all its requests are computed")
            landed, tainted = {load.rid: False for load in batch.loads}, True
        release(self._pool.layers)
        return Landed(landed, tainted)

    # Offloading

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue the write of a node, under the name it has now; False while nothing may be shared."""
        kv = transfers[0]
        digest = self._names.digest()
        if digest is None or not kv.keys or kv.device_indices is None:
            return False
        chain = self._names.chain(digest, self.prefix, kv.keys)
        starts = self._starts(kv.device_indices)
        self._offloads.put(Offload(self._epoch, chain, starts, self._launched()))
        return True

    def num_completed_offloads(self) -> int:
        return len(self._offloaded)

    def pop_completed_offload(self) -> bool:
        return self._offloaded.popleft()

    def _run_offloads(self) -> None:
        while (offload := self._offloads.get()) is not None:
            self._offloaded.append(self._store(offload))
            self._offloads.task_done()

    def _store(self, offload: Offload) -> bool:
        if not self._place.writes:
            return True
        try:
            for event in offload.ready:
                event.synchronize()
            for _, chain, starts in parts(offload.chain, offload.starts, self._out.most_blocks):
                if offload.epoch != self._epoch:
                    return False
                self._out.leave(starts)
                if not self._client.put(chain, self._out.pieces(starts)).all():
                    return False
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: a write to the pool failed; the KV stays local")
            return False
        return True

    # Lifecycle

    def reset(self) -> None:
        """Forget what is queued, and wait for what is under way: at most about a deadline each."""
        self.drop_offloads()
        self._loads.join()
        self._plans.clear()
        self._queued.clear()
        self._started.clear()
        self._offloaded.clear()
        self.layer_done_counter.reset()

    def drop_offloads(self) -> None:
        """Have queued offloads fail, and wait for the one under way."""
        self._epoch += 1
        self._offloads.join()

    def close(self) -> None:
        self.drop_offloads()
        self._loads.put(None)
        self._offloads.put(None)
        for thread in self._threads:
            thread.join()

    def _launched(self) -> list[torch.cuda.Event]:
        """Events after which all that was launched on L1 so far is done; on a CPU it is."""
        return self.record_offload_ready() if self._pool.device.type == "cuda" else []

    def _starts(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[:: self._pool.page_size].to("cpu", torch.int64).contiguous()


def _rank_place(params: CacheInitParams, replicated: bool) -> RankPlace:
    """As ``HiCacheController._generate_storage_config``: blocks are shared with engines in hicache mode."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    by_attention = is_dp_attention_enabled()
    return RankPlace(
        replicated=replicated,
        tp_rank=parallel.attn_tp_rank if by_attention else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if by_attention else parallel.tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        cp_rank=params.attn_cp_rank,
        cp_size=params.attn_cp_size,
    )
