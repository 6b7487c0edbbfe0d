"""Following SGLang's weight updates: KV of old weights is never shared under the name of new ones."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from polarkv_sglang import compat
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.runtime import started_runtime

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    from polarkv_sglang.radix.cache import PolarRadixCache

logger = logging.getLogger(__name__)


@functools.cache
def follow_updates() -> None:
    """Hook everything by which SGLang changes weights in this process.

    Raises IncompatibleSGLang, or ConfigError if the scheduler has its weight updater already: its dispatcher
    calls that as it was, without our hooks.
    """
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    compat.check_surfaces(compat.UPDATE_SURFACES)
    if any(issubclass(type(each), SchedulerWeightUpdaterManager) for each in gc.get_objects()):
        raise ConfigError(
            "SGLang's scheduler has made its weight updater already, so updates would not be noticed; "
            "attach PolarKV where the scheduler makes its cache"
        )
    compat.apply_hooks(dict.fromkeys(compat.WEIGHT_CHANGES, _change_weights), around=True)


def _change_weights(
    change: Callable[..., object], updater: SchedulerWeightUpdaterManager, request: object
) -> object:
    """Around whatever changes weights: nothing is shared from before it until the cache holds no old KV."""
    from polarkv_sglang.radix.cache import PolarRadixCache

    cache = updater.scheduler.tree_cache if updater.scheduler is not None else None
    ours = cache if isinstance(cache, PolarRadixCache) else None
    runtime = started_runtime()
    if runtime is not None and (ours is None or ours.runtime is not runtime):
        if runtime.weights.current is not None:
            logger.warning(
                "PolarKV: weights change under a cache that does not tell when it holds no old KV any more; "
                "KV stays local from now on"
            )
        runtime.weights.end()
    if ours is None:
        return change(updater, request)
    return _change_under(ours, change, updater, request)


def _change_under(
    cache: PolarRadixCache,
    change: Callable[..., object],
    updater: SchedulerWeightUpdaterManager,
    request: object,
) -> object:
    guard = cache.runtime.weights
    before = guard.current
    guard.suspend()
    cache.drain_storage()
    result = change(updater, request)
    # In an open session more weights come, some of them by RDMA and without a call.
    if updater._session is None:
        # A failed update or a look at the weights leaves them, and so the cached KV, as they were.
        unchanged = guard.name() == before
        idle = updater.is_fully_idle(ignore_waiting=updater.scheduler._engine_paused)
        if unchanged or (cache.is_clean and idle):
            guard.adopt()
        else:
            logger.warning(
                "PolarKV: weights changed and the cache was not flushed; KV stays local until it is"
            )
    return result
