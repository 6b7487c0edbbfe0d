"""How this rank's blocks are named: the same in hicache and in direct mode, so that both share them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Final, NamedTuple

from polarkv_sglang.identity import Namespace, block_keys
from polarkv_sglang.pool.blocks import Chain, chain
from polarkv_sglang.runtime import PolarRuntime
from polarkv_sglang.weights import WeightsIdentity

logger = logging.getLogger(__name__)

# Order of the bytes inside a block where K and V are apart, and where there is one part (MLA). HiCache's
# page_first_direct host pools keep pages like this; direct mode packs them like this.
SPLIT_LAYOUT: Final = "[K|V][layer][token][head][dim]"
JOINT_LAYOUT: Final = "[layer][token][dim]"


class RankPlace(NamedTuple):
    """Which shard of the model's KV this rank holds."""

    replicated: bool  # MLA: all ranks of a tensor-parallel group hold the same KV
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int

    @property
    def writes(self) -> bool:
        """Whether this rank puts blocks: of replicated KV, one copy in the pool is enough."""
        return not self.replicated or self.tp_rank == 0


class BlockNames:
    """Names pages of one rank's KV as blocks of the pool.

    The namespace follows the weights guard; a name is final when it is made. May be called by several
    threads.
    """

    def __init__(
        self, runtime: PolarRuntime, place: RankPlace, *, page_tokens: int, block_bytes: int, layout: str
    ) -> None:
        self._runtime = runtime
        self._place = place
        self._page_tokens = page_tokens
        self._block_bytes = block_bytes
        self._layout = layout
        self._latest: tuple[WeightsIdentity, bytes] | None = None

    def namespace(self, weights: WeightsIdentity) -> Namespace:
        """Under what this rank's blocks are shared."""
        place = self._place
        return Namespace(
            weights=weights.fingerprint,
            model_config=weights.model_config,
            kv_dtype=self._runtime.kv_dtype or "",  # pools keep both kinds of fp8 as uint8
            page_tokens=self._page_tokens,
            block_bytes=self._block_bytes,
            block_layout=self._layout,
            tp_rank=0 if place.replicated else place.tp_rank,
            tp_size=place.tp_size,
            pp_rank=place.pp_rank,
            pp_size=place.pp_size,
            cp_rank=place.cp_rank,
            cp_size=place.cp_size,
        )

    def digest(self) -> bytes | None:
        """Stands for the namespace as it is now; None while nothing may be shared."""
        weights = self._runtime.weights.current
        if not self._runtime.is_bound:
            _warn_unbound()
        if weights is None:
            return None
        latest = self._latest
        if latest is None or latest[0] is not weights:
            latest = self._latest = (weights, self.namespace(weights).digest())
        return latest[1]

    def chain(self, digest: bytes, prefix: Sequence[str], pages: Sequence[str]) -> Chain:
        """Blocks of ``pages``, with their place in the prefix; hexadecimal page hashes, heads first."""
        return chain(block_keys(digest, prefix), block_keys(digest, pages), self._runtime.config.stripe_pages)


@functools.cache
def _warn_unbound() -> None:
    logger.warning(
        "PolarKV: the storage is used, but no model was bound to it, so nothing is shared; "
        "make the cache by polarkv_sglang.engine.create_cache, or give it to polarkv_sglang.engine.attach"
    )
