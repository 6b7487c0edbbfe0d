"""CacheBlend brought into a scheduler process."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from polarkv_sglang import compat
from polarkv_sglang.blend.adder import blending_adder
from polarkv_sglang.blend.blender import Blender
from polarkv_sglang.blend.model import Unsupported, inspect_model
from polarkv_sglang.blend.select import selection_of
from polarkv_sglang.blend.shared import SharedDonors
from polarkv_sglang.blend.verdict import UnknownWeights, missing_verdict, verdict_path, verdicts_folder
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.hicache.device_pools import device_pool
from polarkv_sglang.radix.cache import PolarRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput

logger = logging.getLogger(__name__)

_blended: tuple[ModelRunner, Blender] | None = None  # of this process


def start_blending(cache: PolarRadixCache, runner: ModelRunner) -> None:
    """Let the engine blend, if its model and settings can be; says why if not. The same on all ranks.

    Raises ConfigError for stages that the model does not have, IncompatibleSGLang.
    """
    global _blended
    from sglang.srt.runtime_context import get_parallel

    compat.check_surfaces(compat.BLEND_SURFACES)
    try:
        model = inspect_model(runner)
    except Unsupported as reason:
        logger.warning("PolarKV: CacheBlend is off, prompts are computed in full: %s", reason)
        return
    unchecked = _unchecked(cache, runner)
    if unchecked is not None:
        logger.warning(
            "PolarKV: CacheBlend is off: %s; run %s (or set blend_gate=none)",
            unchecked,
            _check_command(cache.runtime.config, runner),
        )
        return
    agree = functools.partial(_agree, cache) if get_parallel().tp_group.world_size > 1 else None
    blender = Blender(cache, model, cache.runtime.config, agree)
    if cache.runtime.config.blend_gate != "none":
        blender.only_for(cache.runtime.weights.current)
    shared = _shared_donors(cache, runner)
    if shared is not None:
        blender.share(shared)
    cache.blender = blender
    _blended = runner, blender
    hooks: dict[str, Callable[..., object]] = {
        compat.ADDER_CLASS: _choose_adder,
        compat.FORWARD: _forward,
    }
    HookRegistry.register(compat.ADDER_CLASS, _choose_adder, HookType.AFTER)
    HookRegistry.register(compat.FORWARD, _forward, HookType.AROUND)
    HookRegistry.apply_hooks()
    compat.check_hooks(hooks)
    logger.info("PolarKV: CacheBlend is on (%s)", cache.runtime.config.blend)


def _shared_donors(cache: PolarRadixCache, runner: ModelRunner) -> SharedDonors | None:
    """What makes donors of the pool's blocks; None if they are not wanted or do not fit L1."""
    from sglang.srt.runtime_context import get_parallel

    from polarkv_sglang.hicache.storage import PolarStorage

    controller, weights = cache.cache_controller, cache.runtime.weights.current
    storage = controller.storage_backend if controller is not None else None
    if not cache.runtime.config.blend_arena_bytes or not isinstance(storage, PolarStorage) or weights is None:
        return None
    names = storage.names()
    space = names.namespace(weights)
    pool = device_pool(runner.token_to_kv_pool, cache.page_size)
    if (space.block_layout, space.block_bytes) != (pool.layout, pool.paged.block_bytes):
        logger.warning(
            "PolarKV: L2 keeps pages as %s; donors in the pool are not blended", space.block_layout
        )
        return None
    return SharedDonors(cache, names, pool, writes=get_parallel().tp_group.rank_in_group == 0)


def _unchecked(cache: PolarRadixCache, runner: ModelRunner) -> str | None:
    """Why the model may not be blended yet; None if it may. With several ranks a collective."""
    config = cache.runtime.config
    if config.blend_gate == "none":
        return None
    try:
        path = verdict_path(verdicts_folder(config.blend_verdicts), runner, selection_of(config))
        reason = missing_verdict(path)
    except UnknownWeights as error:
        reason = str(error)
    except Exception:  # the other ranks wait for an answer
        logger.exception("PolarKV: a model's verdict could not be looked for")
        reason = "its verdict could not be looked for"
    # Hosts may have different folders.
    passed = torch.tensor([int(reason is None)])
    cache._all_reduce(passed, torch.distributed.ReduceOp.MIN)
    return reason or (None if bool(passed) else "the verdict is not on every host")


def _check_command(config: PolarConfig, runner: ModelRunner) -> str:
    """What checks the model as it would be blended here."""
    dtype = str(runner.dtype).removeprefix("torch.")
    command = ["polarkv", "blend-check", str(runner.server_args.model_path), "--dtype", dtype]
    settings = ["blend_check_layer", "blend_metric", "blend_strategy", "blend_stages"]
    settings += ["blend_ratio"] if config.blend_stages else []  # which stages narrow from
    settings += ["blend_verdicts"]
    usual = PolarConfig()
    for name in settings:
        if getattr(config, name) != getattr(usual, name):
            command += ["--" + name.removeprefix("blend_").replace("_", "-"), str(getattr(config, name))]
    return shlex.join(command)


def _agree(cache: PolarRadixCache, numbers: Sequence[int]) -> list[bool]:
    bounds = torch.tensor([numbers, [-number for number in numbers]], dtype=torch.int64)
    cache._all_reduce(bounds, torch.distributed.ReduceOp.MIN)
    least, most = bounds
    return [bool(equal) for equal in least == -most]


def _choose_adder(adder: type[PrefillAdder], scheduler: Scheduler) -> type[PrefillAdder]:
    cache = scheduler.tree_cache
    if not isinstance(cache, PolarRadixCache) or cache.blender is None:
        return adder
    if adder not in _adders:
        _adders[adder] = blending_adder(adder, cache.blender)
    return _adders[adder]


_adders: dict[type[PrefillAdder], type[PrefillAdder]] = {}  # a scheduler asks on every pass


def _forward(
    compute: Callable[..., ModelRunnerOutput],
    runner: ModelRunner,
    forward_batch: ForwardBatch,
    *args: object,
    **kwargs: object,
) -> ModelRunnerOutput:
    def whole() -> ModelRunnerOutput:
        return compute(runner, forward_batch, *args, **kwargs)

    if _blended is None or _blended[0] is not runner:
        return whole()
    result = _blended[1].forward(runner, forward_batch, whole)
    # What a plan brings from L2 arrives while this batch is computed. If the plan is not used, or not yet, no
    # layer has waited for it, and the next batch, which may read it, waits for its own loads only.
    counter = runner.token_to_kv_pool.layer_transfer_counter
    if counter is not None:
        counter.wait_until(counter.num_layers - 1)
    return result
