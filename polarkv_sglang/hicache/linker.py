"""PolarLinker: SGLang's cache linker on the memory pool, L1 <-> L3."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Final

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.hicache.device_pools import device_pool
from polarkv_sglang.hicache.loader import Loader, parts
from polarkv_sglang.hicache.loads import Batch, Landed, Load, Offload
from polarkv_sglang.hicache.lookups import Lookups
from polarkv_sglang.hicache.naming import BlockNames, RankPlace
from polarkv_sglang.hicache.pace import PacedLoadCounter
from polarkv_sglang.hicache.staging import choose_way, passage_or_host
from polarkv_sglang.runtime import current_runtime

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Of batches whose loads all come right, after one that a pass computed with wrong bytes of, until layers are
# released before they are checked again.
_BATCHES_OF_DOUBT: Final = 16


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
    other: if layers had been released, the whole pass is dropped. If not, its pages are zeroed first. So that
    a memory node with bad memory cannot have pass after pass dropped, the next loads are then checked before
    any layer of them is released.

    What a lookup found is leased until its request has loaded it or goes (``lookups``). Beyond what a memory
    node keeps like this a block may be evicted in between: the load then misses it, and it is computed.
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
        kv = params.token_to_kv_pool_allocator.get_kvcache()
        pool = device_pool(kv, params.page_size)
        self._pool = pool.paged
        self._runtime.gpu_memory = self._pool.device.type == "cuda"
        self._client = self._runtime.client
        self._place = _rank_place(params, pool.replicated)
        self._names = BlockNames(
            self._runtime,
            self._place,
            page_tokens=params.page_size,
            block_bytes=self._pool.block_bytes,
            layout=pool.layout,
        )
        self.layer_done_counter = PacedLoadCounter(self._pool.layers, self._pool.device)
        passage_in, way = passage_or_host(self._pool, self._client, choose_way(self._pool, self._client))
        self._out, way_out = passage_or_host(self._pool, self._client, way)
        for each in dict.fromkeys((way, way_out)):
            logger.info("PolarKV: %s", each)
        self._loader = Loader(self._client, passage_in, lambda: self.layer_done_counter.layer_s)
        self.forward_stream = forward_stream if self._pool.device.type == "cuda" else None
        self.pools = {PoolName.KV: kv}
        self.prefix: list[str] = []  # page hashes before those of the next lookup or offload
        self.lookups = Lookups(self._client)
        self._queued: dict[str, Load] = {}
        self._started: dict[int, Batch] = {}
        self._epoch = 0  # offloads of an earlier one are dropped
        self._doubtful = 0  # batches of which no layer is released before it is checked; the load thread's
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

    def begin_lookup(self, rid: str, hashes: list[str]) -> bool:
        """Have the pool asked for a request's pages; False while nothing may be shared."""
        digest = self._names.digest()
        if digest is None:
            return False
        self.lookups.begin(rid, digest, hashes, self._names.chain(digest, self.prefix, hashes))
        return True

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every number of pages that could be restored, as the request's lookup found.

        Where there is none for these pages (this very scheduling pass has evicted some of its prefix in L1),
        the pool is asked now. An answer for which the pass has no more patience counts as a miss.
        """
        hashes = list(transfers[0].keys or ())
        digest = self._names.digest()
        if digest is None or not hashes:
            return []
        lookup = self.lookups.find(rid)
        if lookup is None or lookup.plan.digest != digest or lookup.plan.position(hashes[0]) is None:
            if not self.begin_lookup(rid, hashes):
                return []
            self.lookups.wait([rid])
            lookup = self.lookups.find(rid)
            assert lookup is not None
        plan = lookup.plan
        position = plan.position(hashes[0])
        assert position is not None
        return list(range(1, plan.hits - position + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue what ``lookup`` found into slots of the request; False if that is not what is wanted now."""
        kv = transfers[0]
        lookup = self.lookups.take(rid)
        if lookup is None:
            return False
        plan = lookup.plan
        position = plan.position(kv.keys[0]) if plan.digest == self._names.digest() else None
        part = slice(position, (position or 0) + len(kv.keys))
        if position is None or kv.device_indices is None or plan.hashes[part] != list(kv.keys):
            self.lookups.end(lookup)
            return False
        self._queued[rid] = Load(rid, plan.chain.part(part), self._starts(kv.device_indices), lookup)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        self.lookups.end(load.lookup)
        return True

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
        """Wait for the batch started as ``index``, after the pass that it was for.

        A pass that waited for no layer has computed with slots that may not have been filled.
        """
        batch = self._started.pop(index, None)
        if batch is None:
            return Landed({}, tainted=False)
        landed = batch.landed.result()
        if not self.layer_done_counter.was_asked(index):
            logger.error("PolarKV: a forward pass did not wait for its loads, and is computed again")
            landed = Landed(dict.fromkeys(landed.requests, False), tainted=True)
        self.layer_done_counter.finish(index)
        return landed

    def _run_loads(self) -> None:
        while (batch := self._loads.get()) is not None:
            landed = self._land(batch)
            for load in batch.loads:
                self.lookups.end(load.lookup)
            batch.landed.set_result(landed)
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
            self._use_device()
            for event in batch.ready:
                event.synchronize()
            # A layer is ready when the last request has it.
            *others, last = batch.loads
            landed = {load.rid: self._loader.load(load.chain, load.starts) for load in others}
            early = None if self._doubtful else release
            landed[last.rid] = self._loader.load(last.chain, last.starts, early)
            tainted = released > 0 and not landed[last.rid]
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: the loads of a batch failed; all its requests are computed")
            landed, tainted = {load.rid: False for load in batch.loads}, True
        if tainted or (self._doubtful and not all(landed.values())):
            self._doubtful = _BATCHES_OF_DOUBT
        else:
            self._doubtful = max(0, self._doubtful - 1)
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
            self._use_device()
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
        self.lookups.keep_only(frozenset())
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
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
        self.lookups.close()

    def _use_device(self) -> None:
        """For a thread of its own: each begins on GPU 0, where kernels must not be launched for another."""
        if self._pool.device.type == "cuda":
            torch.cuda.set_device(self._pool.device)

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
