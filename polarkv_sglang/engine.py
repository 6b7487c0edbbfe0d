"""PolarKV in a scheduler process: builds the cache and hooks the scheduler, once enabled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.environ import envs

from polarkv_sglang import compat
from polarkv_sglang.accounting import TokenSources, accounting_streamer
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.metrics import engine_metrics
from polarkv_sglang.plugin import BACKEND, config_of
from polarkv_sglang.radix.cache import PolarRadixCache
from polarkv_sglang.runtime import current_runtime, start_runtime

if TYPE_CHECKING:
    from sglang.srt.beam_search.coordinator import BeamCoordinator
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.model_executor.model_runner import ModelRunner

    from polarkv_sglang.blend.forward import PassCounts
    from polarkv_sglang.radix.direct import DirectRadixCache


def create_cache(context: TreeCacheBuildContext) -> PolarRadixCache:
    """SGLang's factory for ``--radix-cache-backend polarkv``.

    Raises ConfigError, IncompatibleSGLang or TransportError, before the engine serves.
    """
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    config = config_of(context.server_args)
    if config is None:
        raise ConfigError(f"--radix-cache-backend {BACKEND} is chosen by --enable-polarkv, not by itself")
    runtime = start_runtime(config)
    cache: PolarRadixCache = create_unified_radix_cache(
        context, cache_class=functools.partial(PolarRadixCache, runtime=runtime)
    )
    attach(cache, context.tp_worker.model_runner)
    if config.blend != "off":
        from polarkv_sglang.blend.start import start_blending

        start_blending(cache, context.tp_worker.model_runner)
    return cache


def create_direct_cache(factory: Callable[..., object], context: TreeCacheBuildContext) -> DirectRadixCache:
    """The cache of direct mode, made by SGLang's own ``factory``, which makes its linker too.

    Raises ConfigError, IncompatibleSGLang or TransportError, before the engine serves.
    """
    from polarkv_sglang.radix.direct import DirectRadixCache

    config = config_of(context.server_args)
    assert config is not None
    runtime = start_runtime(config)
    cache = factory(context, cache_class=functools.partial(DirectRadixCache, runtime=runtime))
    assert isinstance(cache, DirectRadixCache)
    attach(cache, context.tp_worker.model_runner)
    return cache


def attach(cache: UnifiedRadixCache, model_runner: ModelRunner) -> None:
    """Let a cache share KV: follow weight updates, count tokens by source, and name the model's weights.

    For forks that build their caches: ``cache`` is one of ours, or SGLang's own with PolarStorage below it.
    Of the latter it is not known what it holds after an update: its KV stays local from the first one on.
    Updates are followed that go through SGLang's ``SchedulerWeightUpdaterManager``.

    Called once, where SGLang makes its cache, by all ranks. Until then nothing is shared. Raises
    IncompatibleSGLang, or ConfigError if it is too late to follow updates.
    """
    compat.check_surfaces(compat.ENGINE_SURFACES)
    compat.apply_hooks({compat.STREAMER_CLASS: _choose_streamer, compat.BATCH_RESULT: _see_batch})
    compat.apply_hooks(dict.fromkeys(compat.HASTY_PASSES, _await_layers), around=True)
    if isinstance(cache, PolarRadixCache):
        runtime = cache.runtime
        _follow_direct_loads(cache)
    else:
        runtime = current_runtime()
        runtime.kv_dtype = str(cache.token_to_kv_pool_allocator.get_kvcache().dtype)
    runtime.bind_model(model_runner)


def _follow_direct_loads(cache: PolarRadixCache) -> None:
    """Hook what direct mode needs of a scheduler; does nothing for other caches."""
    from polarkv_sglang.radix.direct import DirectRadixCache

    if not isinstance(cache, DirectRadixCache):
        return
    compat.check_surfaces(compat.DIRECT_SURFACES)
    # A pass may compute with bytes that turn out to be wrong and are not numbers. What it samples is dropped,
    # but sampling must not end the engine.
    envs.SGLANG_SANITIZE_NAN_LOGITS.set(True)
    hooks: dict[str, Callable[..., object]] = {
        compat.CHUNKED_ABORT: _keep_chunked,
        compat.PREFILL_BATCH: _choose_prefill,
        compat.ABORT: _note_abort,
        compat.BEAMS: _refuse_beams,
    }
    compat.apply_hooks(hooks, around=True)


def _await_layers(
    forward: Callable[[TpModelWorker, ScheduleBatch], object], worker: TpModelWorker, batch: ScheduleBatch
) -> object:
    """Around passes that embed or are split: what SGLang (0.5.23) does before those that generate.

    They would compute with slots of L1 that are still being filled, in either mode.
    """
    worker.set_hicache_consumer(batch.hicache_consumer_index)
    return forward(worker, batch)


def _choose_streamer(
    streamer: type[SchedulerOutputStreamer], scheduler: Scheduler
) -> type[SchedulerOutputStreamer]:
    from sglang.srt.runtime_context import get_parallel

    metered = bool(scheduler.server_args.enable_metrics)
    parallel = get_parallel()
    # Of the ranks that serve a request together one counts its tokens; each counts its own share of the pool.
    counts_requests = parallel.attn_tp_rank == parallel.attn_cp_rank == parallel.pp_rank == 0

    def on_finished(finished: list[TokenSources]) -> None:
        if metered and finished:
            metrics = engine_metrics()
            if counts_requests:
                metrics.observe_requests(finished)
            client = current_runtime().client
            metrics.observe_pool(client.statistics(), len(client.membership.live))

    def blend_counts(request: Req) -> PassCounts | None:
        cache = scheduler.tree_cache
        blends = isinstance(cache, PolarRadixCache) and cache.blender is not None
        return cache.blender.counts(request) if blends else None

    return accounting_streamer(streamer, on_finished, blend_counts)


def _see_batch(_result: None, scheduler: Scheduler, batch: ScheduleBatch, _batch_result: object) -> None:
    cache = scheduler.tree_cache
    if not (
        isinstance(cache, PolarRadixCache) and batch.forward_mode.is_extend() and batch.extend_num_tokens
    ):
        return
    if cache.blender is not None and cache.blender.see_batch(batch.reqs):
        return  # a blended pass says nothing about the speed of prefill
    cache.rates.observe_prefill(batch.extend_num_tokens, batch.launch_ts)


def _keep_chunked(abort: Callable[[Scheduler], None], scheduler: Scheduler) -> None:
    from polarkv_sglang.radix.direct import DirectRadixCache

    if isinstance(scheduler.tree_cache, DirectRadixCache):
        scheduler.tree_cache.recompute.take_chunked(scheduler)
    abort(scheduler)


def _choose_prefill(
    choose: Callable[[Scheduler, ScheduleBatch], object], scheduler: Scheduler, running_batch: ScheduleBatch
) -> object:
    """Around the choice of a prefill batch: without requests for which the pool was not heard yet."""
    from polarkv_sglang.radix.direct import DirectRadixCache, in_order

    cache = scheduler.tree_cache
    if not isinstance(cache, DirectRadixCache):
        return choose(scheduler, running_batch)
    cache.recompute.revive(scheduler)
    queued = list(scheduler.waiting_queue)
    # Those whose grammar is ready join the queue in ``choose``: they are looked up while it is compiled.
    pending = {id(each) for each in cache.look_up([*queued, *scheduler.grammar_manager.grammar_queue])}
    aside = [request for request in queued if id(request) in pending]
    if not aside:
        return choose(scheduler, running_batch)
    scheduler.waiting_queue = [request for request in queued if id(request) not in pending]
    try:
        return choose(scheduler, running_batch)
    finally:
        scheduler.waiting_queue = in_order(queued, [*scheduler.waiting_queue, *aside])


def _note_abort(abort: Callable[[Scheduler, AbortReq], None], scheduler: Scheduler, wanted: AbortReq) -> None:
    from polarkv_sglang.radix.direct import DirectRadixCache

    abort(scheduler, wanted)
    if isinstance(scheduler.tree_cache, DirectRadixCache):
        scheduler.tree_cache.recompute.abort(wanted)


def _refuse_beams(_validate: object, _coordinator: BeamCoordinator, _req: Req, _recv_req: object) -> str:
    """In place of SGLang's checks: a group of beams cannot be taken back into the queue."""
    return "Beam search is not supported with --polarkv-mode direct."
