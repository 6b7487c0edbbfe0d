"""Which weights this rank's KV belongs to, through every weight update."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
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
    one that was started from them. This is the weight epoch too: an identity is only adopted while the
    cache holds nothing, and SGLang joins the storage threads and clears their queues before it empties
    the cache, so no operation is carried out under another identity than it was created under.

    All methods are called by the scheduler thread; ``current`` is also read by HiCache's storage threads.
    """

    def __init__(self, identify: Callable[[], WeightsIdentity]) -> None:
        self._identify = identify
        self._named: WeightsIdentity | None = None
        self._ended = False
        self.current: WeightsIdentity | None = None

    def suspend(self) -> None:
        """Weights are about to change: share nothing until they are named and adopted."""
        self.current = self._named = None

    def name(self) -> WeightsIdentity:
        """Name the weights as they are now. A collective: every rank of the engine calls it."""
        self._named = self._identify()
        return self._named

    def adopt(self) -> None:
        """Share under the named weights; called when no KV of other weights is cached or in flight."""
        if self._named is not None and self.current is None and not self._ended:
            self.current = self._named
            logger.info("PolarKV: weights %s", self.current.fingerprint[:16])

    def end(self) -> None:
        """Share nothing any more, whatever is named later."""
        self._ended = True
        self.suspend()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Share nothing meanwhile, so that storage operations that are queued end at once."""
        held, self.current = self.current, None
        try:
            yield
        finally:
            self.current = held


def identify_model(runner: ModelRunner) -> WeightsIdentity:
    """Identity of the model that a runner serves. A collective over all ranks of the engine."""
    import torch.distributed as dist

    local = fingerprint_weights(runner.model.state_dict().items())
    fingerprints: list[str | None] = [local]
    if dist.is_initialized() and dist.get_world_size() > 1:
        from sglang.srt.distributed.parallel_state import get_world_group

        # KV of one rank depends on the weights of all: attention output is reduced over them.
        fingerprints = [None] * dist.get_world_size()
        dist.all_gather_object(fingerprints, local, group=get_world_group().cpu_group)
    return WeightsIdentity(
        fingerprint=hashlib.sha256(repr(fingerprints).encode()).hexdigest(),
        model_config=digest_config(runner.model_config.hf_config.to_dict()),
    )
