"""PolarRadixCache with small pools in this process, against real memory nodes."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import CacheRequestHandle
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from polarkv_sglang import runtime as runtime_module
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.platforms import install_cpu_hooks
from polarkv_sglang.plugin import enable
from polarkv_sglang.radix import PolarRadixCache, SpillPolicy
from polarkv_sglang.runtime import PolarRuntime
from polarkv_sglang.weights import WeightsIdentity

PAGE_TOKENS = 16
LAYERS = 4


class Queued(NamedTuple):
    """A request, as far as a cache knows it."""

    rid: str
    tokens: list[int]
    extra_key: str | None = None
    salt: str | None = None
    storage_prefetch_retry_attempts: int = 0

    @property
    def handle(self) -> CacheRequestHandle:
        return CacheRequestHandle(self.rid, 0)


class Engine:
    """What a scheduler does with its cache, without a model: KV is a function of the token."""

    def __init__(
        self,
        config: PolarConfig,
        *,
        weights: str = "weights A",
        l1_tokens: int = 512,
        l2_ratio: float = 1.5,
        mla: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        page_tokens: int = PAGE_TOKENS,
        core: str = "rust",
        policy: SpillPolicy | None = None,
    ) -> None:
        load_plugins()
        install_cpu_hooks()
        arguments = ServerArgs(
            model_path="dummy", page_size=page_tokens, device="cpu", **self._flags(page_tokens, l2_ratio)
        )
        arguments._mamba_cache_chunk_size = 64
        enable(arguments, config)
        set_global_server_args_for_scheduler(arguments)
        get_parallel().override_permanently(tp_rank=0, pp_rank=0, attn_dcp_rank=0)
        self.page_tokens = page_tokens
        if mla:
            self.pool = MLATokenToKVPool(
                size=l1_tokens,
                page_size=page_tokens,
                dtype=dtype,
                kv_lora_rank=48,
                qk_rope_head_dim=16,
                layer_num=LAYERS,
                device="cpu",
                enable_memory_saver=False,
            )
        else:
            self.pool = MHATokenToKVPool(
                size=l1_tokens,
                page_size=page_tokens,
                dtype=dtype,
                head_num=2,
                head_dim=64,
                layer_num=LAYERS,
                device="cpu",
                enable_memory_saver=False,
            )
        self.allocator = PagedTokenToKVPoolAllocator(
            size=l1_tokens,
            page_size=page_tokens,
            dtype=dtype,
            device="cpu",
            kvcache=self.pool,
            need_sort=False,
        )
        params = CacheInitParams(
            req_to_token_pool=ReqToTokenPool(
                size=8, max_context_len=4096, device="cpu", enable_memory_saver=False
            ),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_tokens,
            disable=False,
            tree_components=(ComponentType.FULL,),
            eviction_policy="lru",
            tree_core_backend=core,
        )
        self.runtime = PolarRuntime(config)
        runtime_module._runtime = self.runtime  # as start_runtime does, for the storage that HiCache makes
        self.weights = weights
        self.runtime.weights._identify = lambda: WeightsIdentity(self.weights, "config")
        self.runtime.weights.name()
        self.runtime.weights.adopt()
        self.cache = self._make_cache(arguments, params, policy)
        assert self.runtime.client.membership.wait_tried(10)
        self._requests = 0

    def _flags(self, page_tokens: int, l2_ratio: float) -> dict[str, object]:
        return {
            "hicache_io_backend": "direct",
            "hicache_mem_layout": "page_first_direct",
            "hicache_ratio": l2_ratio,
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend_extra_config": f'{{"prefetch_threshold": {page_tokens}}}',
        }

    def _make_cache(
        self, arguments: ServerArgs, params: CacheInitParams, policy: SpillPolicy | None
    ) -> PolarRadixCache:
        cache = PolarRadixCache(params, runtime=self.runtime, policy=policy)
        cache.init_hicache(arguments, params)
        return cache

    def close(self) -> None:
        self.cache.shutdown()
        self.cache.release_host_resources()
        self.runtime.client.close()

    # What the engine computes

    def _buffers(self) -> list[torch.Tensor]:
        if isinstance(self.pool, MLATokenToKVPool):
            return list(self.pool.kv_buffer)
        return [*self.pool.k_buffer, *self.pool.v_buffer]

    def _compute(self, tokens: list[int], slots: torch.Tensor) -> None:
        for layer, buffer in enumerate(self._buffers()):
            buffer[slots] = _kv(tokens, layer, buffer)

    def holds(self, tokens: list[int], slots: torch.Tensor) -> bool:
        """Whether every byte in L1 at ``slots`` is the KV of ``tokens``."""
        return all(
            torch.equal(buffer[slots], _kv(tokens, layer, buffer).expand_as(buffer[slots]))
            for layer, buffer in enumerate(self._buffers())
        )

    # What a scheduler does

    def serve(
        self, tokens: list[int], *, extra_key: str | None = None, salt: str | None = None
    ) -> tuple[int, int, int]:
        """Run one prompt (whole pages): tokens from L1, L2 and L3; the rest is computed. Checks all KV."""
        self._requests += 1
        request = Queued(f"request {self._requests}", tokens, extra_key, salt)
        self.fetch(request)
        return self.admit(request)

    def fetch(self, request: Queued) -> None:
        """What is done when a request arrives."""
        cache = self.cache
        found = self._match(request)
        matched = found.device_prefix_len + found.host_hit_length
        anchor = found.last_host_node if hasattr(found, "last_host_node") else found.best_match_node
        cache.prefetch_from_storage(
            request.handle,
            anchor,
            array("q", request.tokens[matched:]),
            cache.get_last_hash_value(anchor),
            cache.get_prefix_hash_values(anchor),
            matched_prefix_tokens=request.tokens[:matched],
            extra_key=request.extra_key,
            cache_salt=request.salt,
        )

    def admit(self, request: Queued) -> tuple[int, int, int]:
        """Wait for what is fetched for a request, and run it."""
        cache, tokens = self.cache, request.tokens
        self.settle(lambda: cache.check_prefetch_progress(request.handle))
        l3 = cache.pop_prefetch_loaded_tokens(request.handle)
        found = self._match(request)
        l1 = found.device_prefix_len
        host = found.host_hit_length
        if host:
            if self.allocator.available_size() < host:
                lock = cache.lock(found.best_match_node)
                cache.evict_for_alloc(EvictParams(num_tokens=host - self.allocator.available_size()))
                cache.unlock(lock)
            if cache.load_back(found.best_match_node):
                cache.ready_to_load_host_cache()
            found = self._match(request)
        ready = found.device_prefix_len
        slots = cache.path_device_indices(found.best_match_node)[:ready]
        need = len(tokens) - ready
        if need:
            lock = cache.lock(found.best_match_node) if ready else None
            if self.allocator.available_size() < need:
                cache.evict_for_alloc(EvictParams(num_tokens=need - self.allocator.available_size()))
            new = self.allocator.alloc(need)
            assert new is not None
            self._compute(tokens[ready:], new)
            slots = torch.cat([slots.to(torch.int64), new.to(torch.int64)])
            cache.insert(
                InsertParams(key=self._key_of(request), value=slots.to(torch.int64), prev_prefix_len=ready)
            )
            cache.unlock(lock)
        assert self.holds(tokens, slots), "KV in L1 is not that of the prompt"
        cache.storage_prefetch_retries.cancel(request.rid)
        self.step()
        return l1, ready - l1 - l3, l3

    def step(self, times: int = 3) -> None:
        for _ in range(times):
            self.cache.check_hicache_events()

    def settle(self, done=None, timeout_s: float = 20) -> None:
        """Scheduler steps until all transfers have ended (and ``done()`` holds)."""
        cache = self.cache
        end = time.monotonic() + timeout_s
        while True:
            self.step(1)
            busy = cache.ongoing_backup or cache.ongoing_write_through
            if (done is None and not busy) or (done is not None and done()):
                return
            assert time.monotonic() < end, "transfers did not end"
            time.sleep(0.002)

    def forget(self) -> None:
        """Lose L1 and L2, as a restart does."""
        self.settle()
        self.cache.reset()
        self.allocator.clear()

    def _key(self, tokens: list[int], extra_key: str | None, salt: str | None) -> RadixKey:
        return RadixKey(array("q", tokens), extra_key=extra_key, cache_salt=salt)

    def _key_of(self, request: Queued) -> RadixKey:
        return self._key(request.tokens, request.extra_key, request.salt)

    def _match(self, request: Queued):
        return self.cache.match_prefix(MatchPrefixParams(key=self._key_of(request)))


def _kv(tokens: list[int], layer: int, like: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(tokens, dtype=torch.float32) % 251 + layer
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def prompt(number: int, tokens: int) -> list[int]:
    """A prompt that shares nothing with those of other numbers."""
    return [1000 * number + i % 997 for i in range(1, tokens + 1)]


@contextlib.contextmanager
def an_engine(config: PolarConfig, **settings: object) -> Iterator[Engine]:
    engine = Engine(config, **settings)
    try:
        yield engine
    finally:
        engine.close()
