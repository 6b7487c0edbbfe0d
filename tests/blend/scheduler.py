"""What a scheduler does for a prompt, in this process: SGLang's own parts around a real model."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from polarkv_sglang.blend.adder import blending_adder
from polarkv_sglang.blend.blender import Blender
from polarkv_sglang.blend.forward import PassCounts
from polarkv_sglang.blend.offline import OfflineModel
from polarkv_sglang.blend.start import start_blending
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.radix import PolarRadixCache
from polarkv_sglang.runtime import PolarRuntime

CONFIG = PolarConfig(blend="ask", blend_min_tokens=64, blend_gate="none")


class Served(NamedTuple):
    logits: torch.Tensor  # [vocabulary], after the prompt
    cached_tokens: int  # exact ones, as SGLang counts them
    counts: PassCounts
    passes: int


class Scheduler:
    """A radix tree, a blender and a model; each prompt is prefilled, answered by one token and released."""

    def __init__(self, model: OfflineModel, config: PolarConfig) -> None:
        model.clear()
        self.runner = model.runner
        runtime = PolarRuntime(config)
        runtime.bind_model(self.runner)
        self.allocator = self.runner.token_to_kv_pool_allocator
        self.cache = PolarRadixCache(
            CacheInitParams(
                req_to_token_pool=self.runner.req_to_token_pool,
                token_to_kv_pool_allocator=self.allocator,
                page_size=self.allocator.page_size,
                disable=False,
                tree_components=(ComponentType.FULL,),
                eviction_policy="lru",
            ),
            runtime=runtime,
        )
        start_blending(self.cache, self.runner)
        assert self.cache.blender is not None
        self.blender: Blender = self.cache.blender
        self._requests = 0

    def request(self, tokens: list[int], **custom: object) -> Req:
        self._requests += 1
        return Req(
            rid=f"request {self._requests}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1, custom_params=custom or None),
        )

    def adder(self, chunk: int = 1 << 20) -> PrefillAdder:
        return blending_adder(PrefillAdder, self.blender)(
            self.allocator.page_size, self.cache, self.allocator, None, 0.5, 1 << 20, chunk
        )

    def serve(
        self,
        tokens: list[int],
        *,
        chunk: int = 1 << 20,
        before_passes: Callable[[], object] = lambda: None,
        **custom: object,
    ) -> Served:
        """Serve one prompt, in prefill passes of ``chunk`` tokens; ``before_passes`` is called in between."""
        return self.serve_request(self.request(tokens, **custom), chunk, before_passes)

    def serve_request(
        self, request: Req, chunk: int = 1 << 20, before_passes: Callable[[], object] = lambda: None
    ) -> Served:
        """As ``serve``, for a request that is there."""
        request.init_next_round_input(self.cache)
        adder = self.adder(chunk)
        adder.add_one_req(request, has_chunked_req=False, truncation_align_size=None)
        assert adder.can_run_list == [request]
        before_passes()
        return self.compute(request, chunk)

    def compute(self, request: Req, chunk: int = 1 << 20) -> Served:
        """Prefill a request that is in a batch, answer and release it."""
        tokens = request.full_untruncated_fill_ids
        passes = 1
        logits = self._compute(request)
        while request.extend_end < len(tokens):
            checkpoint_kv_cache(request, self.cache)
            self.blender.see_batch([request])
            request.init_next_round_input()
            adder = self.adder(chunk)
            adder.add_chunked_req(request)
            logits = self._compute(request)
            passes += 1
        request.output_ids.append(int(logits.argmax()))
        request.kv.kv_committed_len = len(tokens)
        request.finished_reason = FINISH_LENGTH(1)
        self.blender.see_batch([request])
        release_kv_cache(request, self.cache, checkpoint=True)
        return Served(logits, request.cached_tokens, self.blender.counts(request), passes)

    def forget(self) -> None:
        """Empty tree and pool."""
        self.cache.reset()
        self.allocator.clear()

    def _compute(self, request: Req) -> torch.Tensor:
        batch = ScheduleBatch.init_new(
            [request],
            self.runner.req_to_token_pool,
            self.allocator,
            self.cache,
            self.runner.model_config,
            False,
            SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        forward_batch = ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)
        with torch.no_grad():
            return self.runner.forward(forward_batch).logits_output.next_token_logits[0].clone()


@contextlib.contextmanager
def scheduling(model: OfflineModel, config: PolarConfig = CONFIG) -> Iterator[Scheduler]:
    """A scheduler that starts with nothing, and leaves nothing."""
    yield Scheduler(model, config)
    model.clear()
