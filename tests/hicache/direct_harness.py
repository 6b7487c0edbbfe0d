"""DirectRadixCache and its linker with small pools in this process, against real memory nodes."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.hicache.linker import PolarLinker
from polarkv_sglang.radix import SpillPolicy
from polarkv_sglang.radix.direct import DirectRadixCache
from tests.faults.nodes import FaultyNode
from tests.radix.harness import Engine

DEADLINE_S = 0.5


def _nothing() -> None:
    pass


class DirectEngine(Engine):
    """What a scheduler does with the cache of direct mode, without a model: KV is a function of the token."""

    cache: DirectRadixCache
    recomputed = 0  # loads that failed

    def _flags(self, page_tokens: int, l2_ratio: float) -> dict[str, object]:
        return {}

    def _make_cache(
        self, arguments: ServerArgs, params: CacheInitParams, policy: SpillPolicy | None
    ) -> DirectRadixCache:
        cache = DirectRadixCache(params, runtime=self.runtime)
        cache.init_cache_linker(PolarLinker(arguments, params, components=set(cache.components)))
        return cache

    @property
    def linker(self) -> PolarLinker:
        assert self.cache.linker is not None
        return self.cache.linker.cache_linker

    def request(self, tokens: list[int], extra_key: str | None = None, salt: str | None = None) -> Req:
        self._requests += 1
        sampling = SamplingParams(max_new_tokens=1)
        rid = f"request {self._requests}"
        return Req(rid, "", array("q", tokens), sampling, extra_key=extra_key, cache_salt=salt)

    def queued(self, tokens: list[int], extra_key: str | None = None, salt: str | None = None) -> Req:
        """A request for whole pages that waited in the queue until the pool was heard of."""
        # The last token is computed whatever is cached.
        request = self.request([*tokens, 7], extra_key, salt)
        self.look_up(request)
        return request

    def look_up(self, *waiting: Req) -> None:
        """Scheduling passes until the pool was heard of for all."""
        while self.cache.look_up(waiting):
            pass

    def match_of(self, request: Req) -> MatchPrefixParams:
        key = self._key(list(request.origin_input_ids), None, None)
        return MatchPrefixParams(key=key, req=request)

    def serve(
        self,
        tokens: list[int],
        *,
        extra_key: str | None = None,
        salt: str | None = None,
        before_load: Callable[[], object] = _nothing,
    ) -> tuple[int, int, int]:
        """Run one prompt (whole pages): tokens from L1, L2 (none) and L3. Checks all KV.

        ``before_load`` is called between the lookup and the load.
        """
        request = self.queued(tokens, extra_key, salt)
        while True:
            key = self._key(tokens, extra_key, salt)
            found = self.cache.match_prefix(MatchPrefixParams(key=key, req=request))
            l1, hits = found.device_prefix_len, found.host_hit_length
            request.last_node = found.last_device_node
            before_load()
            before_load = _nothing
            slots = self.cache.path_device_indices(found.best_match_node)[:l1].to(torch.int64)
            lock = self.cache.lock(found.best_match_node) if l1 else None
            if hits:
                loaded = self.cache.init_load_back(
                    InitLoadBackParams(
                        best_match_node=found.best_match_node, host_hit_length=hits, req=request
                    )
                )
                assert loaded is not None
                hits = loaded[0]
                tail = self.cache.linker.private_load_indices.get(request.rid)
                if hits:
                    slots = torch.cat([slots, tail.to(torch.int64)])
            ready = l1 + hits
            new = self._slots(len(tokens) - ready)
            self._forward(tokens, slots, ready, new)
            failed = self.cache.finish_external_linker_loads([request])
            if failed:
                self.recomputed += 1
                self.allocator.free(torch.cat([slots[l1:], new]))
                self.cache.unlock(lock)
                self.look_up(request)
                continue
            assert self.holds(tokens[:ready], slots), "KV in L1 is not that of the prompt"
            slots = torch.cat([slots, new])
            self.cache.insert(InsertParams(key=key, value=slots, prev_prefix_len=l1))
            self.cache.unlock(lock)
            self.step()
            return l1, 0, hits

    def _slots(self, count: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, dtype=torch.int64)
        if self.allocator.available_size() < count:
            self.settle()  # nodes that are being written are locked; a scheduler would wait too
            self.cache.evict_for_alloc(EvictParams(num_tokens=count - self.allocator.available_size()))
        new = self.allocator.alloc(count)
        assert new is not None
        return new.to(torch.int64)

    def _forward(self, tokens: list[int], slots: torch.Tensor, ready: int, new: torch.Tensor) -> None:
        """Read each layer of what is loaded as it arrives, and write what is new."""
        counter = self.linker.layer_done_counter
        counter.set_consumer(self.cache.ready_to_load_host_cache())
        for layer in range(counter.num_layers):
            counter.wait_until(layer)
        self._compute(tokens[ready:], new)

    def settle(self, done: Callable[[], bool] | None = None, timeout_s: float = 20) -> None:
        """Scheduler steps until all writes have ended (and ``done()`` holds)."""
        end = time.monotonic() + timeout_s
        while self.cache.linker.pending_offloads or (done is not None and not done()):
            self.step(1)
            assert time.monotonic() < end, "writes did not end"
            time.sleep(0.002)

    def check_integrity(self) -> None:
        """Nothing under way: every slot is in the tree or free, and nothing is locked."""
        self.settle()
        assert not self.cache.look_up([]), "an empty queue waits for nothing"
        self.cache.sanity_check()
        linker = self.cache.linker
        assert not linker.inflight_load_rids
        assert not linker.private_load_indices
        assert not self.linker._started
        assert not self.linker._queued
        assert self.cache.protected_size() == 0
        assert self.allocator.available_size() + self.cache.evictable_size() == self.allocator.size


@contextlib.contextmanager
def a_direct_engine(config: PolarConfig, **settings: object) -> Iterator[DirectEngine]:
    engine = DirectEngine(config, **settings)
    try:
        yield engine
    finally:
        engine.close()


def direct_settings(*nodes: FaultyNode, **more: object) -> PolarConfig:
    """Of direct mode with these nodes."""
    addresses = tuple(node.address for node in nodes)
    return PolarConfig(nodes=addresses, mode="direct", deadline_s=DEADLINE_S, **more)  # type: ignore[arg-type]


def wait_for_no_lease(node: FaultyNode) -> None:
    node.wait_until(lambda now: now.leases == 0, "no lease is left")


def abort_queued(engine: DirectEngine, tokens: list[int]) -> None:
    """A request that is found in the pool, has its load queued, and is aborted before its batch starts."""
    request = engine.queued(tokens)
    found = engine.cache.match_prefix(MatchPrefixParams(key=engine._key(tokens, None, None), req=request))
    request.last_node = found.last_device_node
    if found.host_hit_length:
        lock = engine.cache.lock(found.best_match_node) if found.device_prefix_len else None
        engine.cache.init_load_back(
            InitLoadBackParams(
                best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=request
            )
        )
        slots = engine.cache.linker.private_load_indices.get(request.rid, torch.empty(0))
        engine.cache.release_aborted_request(request.cache_request_handle)
        if len(slots):
            engine.allocator.free(slots)
        engine.cache.unlock(lock)
    else:
        engine.cache.release_aborted_request(request.cache_request_handle)
