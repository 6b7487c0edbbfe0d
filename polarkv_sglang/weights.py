"""Which weights this rank's KV belongs to, through every weight update."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from polarkv_sglang.identity import digest_config, fingerprint_weights

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class WeightsIdentity(msgspec.Struct, frozen=True):
    """What the weights in memory are."""

    fingerprint: str  # over the parameters of all ranks
    model_config: str  # digest of the Hugging Face config


class WeightsGuard:
    """Tells under which identity KV may be shared; None while weights and cached KV may disagree.

    The weights are named by their bytes, so an engine that was updated to some weights shares with
    one that was started from them. There is no epoch to stamp on queued operations: an identity is
    only adopted when the cache holds nothing, and SGLang joins the storage threads and clears their
    queues before it empties the cache, so no operation outlives the identity it was created under.

    All methods are called by the scheduler thread, on all ranks alike (``settle`` is a collective);
    ``current`` is also read by HiCache's storage threads.
    """

    def __init__(self, identify: Callable[[], WeightsIdentity]) -> None:
        self._identify = identify
        self.current: WeightsIdentity | None = None

    def suspend(self) -> None:
        """Weights are about to change: share nothing until ``settle``."""
        self.current = None

    def settle(self, *, cache_is_clean: bool) -> None:
        """Adopt the weights as they are now, if no KV of other weights is cached or in flight."""
        if self.current is not None:
            return
        if not cache_is_clean:
            logger.warning(
                "PolarKV: weights changed, but the cache was not flushed; KV stays on this engine "
                "until /flush_cache succeeds"
            )
            return
        self.current = self._identify()
        logger.info("PolarKV: weights %s", self.current.fingerprint[:16])


def identify_model(runner: ModelRunner) -> WeightsIdentity:
    """Identity of the model that a runner serves. A collective over all ranks of the engine."""
    import torch.distributed as dist

    local = fingerprint_weights(runner.model.state_dict().items())
    fingerprints: list[str | None] = [local]
    if dist.is_initialized() and dist.get_world_size() > 1:
        from sglang.srt.distributed import get_world_group

        # KV of one rank depends on the weights of all: attention output is reduced over them.
        fingerprints = [None] * dist.get_world_size()
        dist.all_gather_object(fingerprints, local, group=get_world_group().cpu_group)
    return WeightsIdentity(
        fingerprint=hashlib.sha256(repr(fingerprints).encode()).hexdigest(),
        model_config=digest_config(runner.model_config.hf_config.to_dict()),
    )
