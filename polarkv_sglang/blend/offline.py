"""A model in this process, without a scheduler: prompts prefilled in full or blended, and their KV."""

from __future__ import annotations

import functools
import socket
import time
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch

from polarkv_sglang.blend.forward import BlendPass, PassCounts
from polarkv_sglang.blend.model import BlendModel, inspect_model
from polarkv_sglang.blend.plan import Piece, Plan
from polarkv_sglang.blend.select import Selection

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class Prefilled(NamedTuple):
    """A prompt whose KV is in the pool until ``OfflineModel.clear``."""

    tokens: list[int]
    slots: torch.Tensor  # int64 [tokens]
    logits: torch.Tensor  # float32 [tail, vocabulary]: of the last tokens
    counts: PassCounts  # of all its passes
    computed_rows: list[list[int]]  # per pass, those that the last layer computed, counted from 0
    seconds: float  # spent in forward passes
    cpu_seconds: float  # of all threads of this process

    def pieces(self, start: int, end: int, at: int) -> Piece:
        """The KV of its tokens [start, end), for a prompt that has them from ``at`` on."""
        return Piece(at, start, self.slots[start:end])


class OfflineModel:
    """A model in this process. SGLang keeps its settings in globals: only the one made last can be used."""

    def __init__(
        self,
        model_path: str,
        *,
        max_tokens: int,
        dtype: str = "float32",
        page_tokens: int = 16,
        rank: int = 0,
        ranks: int = 1,
        port: int = 0,
    ) -> None:
        """Load the model, with room for ``max_tokens`` tokens of KV. Raises Unsupported.

        With tensor parallelism this is ``rank`` of ``ranks``, and all of them name the ``port`` of the first.
        """
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap, model_parallel_is_initialized
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, get_device, publish, spawn_world_rank
        from sglang.srt.server_args import ServerArgs

        load_plugins()
        arguments = ServerArgs(
            model_path=model_path,
            dtype=dtype,
            page_size=page_tokens,
            max_total_tokens=max_tokens,
            max_running_requests=64,
            tp_size=ranks,
            disable_radix_cache=True,
            disable_cuda_graph=True,
            log_level="error",
        )
        world_rank = spawn_world_rank(arguments, tp_rank=rank, pp_rank=0)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=rank))
        initialize_moe_config()
        config = ModelConfig.from_server_args(arguments)
        port = port or _free_port()
        if not model_parallel_is_initialized():
            device = get_device().device
            bootstrap.init_parallel_runtime(server_args=arguments, device=device, dist_port=port)
        bootstrap.init_layer_runtime(model_config=config)
        self.runner = ModelRunner(
            model_config=config,
            mem_fraction_static=arguments.mem_fraction_static,
            gpu_id=rank,
            nccl_port=port,
            server_args=arguments,
        )
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()
        self.model: BlendModel = inspect_model(self.runner)
        self._requests: list[Req] = []  # whose KV is in the pool

    def clear(self) -> None:
        """Forget all prompts."""
        self._requests.clear()
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()

    def forget(self, prefilled: Prefilled) -> None:
        """Free the slots of one prompt; its KV is gone."""
        pages = prefilled.slots[:: self.runner.token_to_kv_pool_allocator.page_size]
        self.runner.token_to_kv_pool_allocator.free(pages)

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        plan: Plan | None = None,
        selection: Selection | None = None,
        passes: Sequence[int] = (),
        tail: int = 1,
    ) -> Prefilled:
        """Compute a prompt's KV, in passes that end at ``passes`` and at its end.

        With a plan each pass with cached rows is blended by ``selection``. ``logits`` are of the last
        ``tail`` tokens, which have to be in the last pass; with a plan, those of tokens it does not compute
        are zero.
        """
        request = self._request(tokens)
        ends = [*passes, len(tokens)]
        hidden: list[torch.Tensor] = []
        hook = self.runner.model.model.register_forward_hook(lambda *args: hidden.append(args[2]))
        counts, rows, seconds, cpu_seconds = PassCounts(0, 0), [], 0.0, 0.0
        try:
            for start, end in zip([0, *ends], ends):
                request.prefix_len, request.extend_end = start, end
                batch = self._batch(request)
                cached = plan.rows(start, end) if plan is not None else None
                blended = (
                    BlendPass(self.model, self.runner, batch, cached, selection)
                    if cached is not None and len(cached) and selection is not None
                    else None
                )
                wall, cpu = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    if blended is None:
                        self.runner.forward(batch)
                        rows.append(list(range(end - start)))
                    else:
                        blended.run(functools.partial(self.runner.forward, batch))
                        counts = PassCounts(*(sum(pair) for pair in zip(counts, blended.counts)))
                        rows.append(blended.computed_rows.tolist())
                seconds += time.perf_counter() - wall
                cpu_seconds += time.process_time() - cpu
        finally:
            hook.remove()
        weight = self.runner.model.lm_head.weight.float()
        logits = hidden[-1][-tail:].float() @ weight.T
        slots = self.runner.req_to_token_pool.req_to_token[request.kv.req_pool_idx, : len(tokens)]
        return Prefilled(list(tokens), slots.to(torch.int64), logits, counts, rows, seconds, cpu_seconds)

    def kv(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values at ``slots``: [layers, tokens, heads, dim] each."""
        layers = range(len(self.model.layers))
        buffers = [self.runner.token_to_kv_pool.get_kv_buffer(layer) for layer in layers]
        return torch.stack([k[slots] for k, _ in buffers]), torch.stack([v[slots] for _, v in buffers])

    def _request(self, tokens: Sequence[int]) -> Req:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = Req(
            rid=str(len(self._requests)),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        self._requests.append(request)
        return request

    def _batch(self, request: Req) -> object:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        pool = self.runner.token_to_kv_pool_allocator
        batch: ScheduleBatch = ScheduleBatch.init_new(
            reqs=[request],
            req_to_token_pool=self.runner.req_to_token_pool,
            token_to_kv_pool_allocator=pool,
            tree_cache=_NoCache(
                page_size=pool.page_size, device=self.runner.device, token_to_kv_pool_allocator=pool
            ),
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        return ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)


class _NoCache(SimpleNamespace):
    """As much of a prefix cache as a batch asks for that shares nothing."""

    def supports_swa(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False

    def supports_prefix_sharing(self) -> bool:
        return False

    def available_and_evictable_str(self) -> str:
        return f"{self.token_to_kv_pool_allocator.available_size()} tokens are free, none can be evicted"

    def maybe_hand_to_session(self, _request: Req) -> None:
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
