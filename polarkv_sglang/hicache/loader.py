"""Bringing blocks from the pool into L1, group of layers by group of layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from polarkv_sglang.hicache.groups import layer_groups
from polarkv_sglang.hicache.staging import Passage, clear_pages
from polarkv_sglang.kernels.layout import LayerRange
from polarkv_sglang.pool.blocks import Chain, Stages
from polarkv_sglang.pool.client import PoolClient

logger = logging.getLogger(__name__)

_FIRST_GUESS_BPS: Final = 1e9


class Loader:
    """Reads blocks into pages of L1; used by one thread."""

    def __init__(self, client: PoolClient, passage: Passage, layer_s: Callable[[], float]) -> None:
        """``layer_s`` tells the seconds that the forward pass computes with a layer; 0 if not known yet."""
        self._layer_s = layer_s
        self._client = client
        self._passage = passage
        self._pool = passage.pool

    def load(self, chain: Chain, starts: torch.Tensor, release: Callable[[int], None] | None = None) -> bool:
        """Whether all blocks are in the pages that begin at slots ``starts``, and right.

        ``release`` is called with the number of layers that have arrived, where they come one after another:
        before they are checked, which only the answer tells of. Pages of blocks that did not come, or came
        wrong, are zeroed. Takes about a deadline for as many blocks as go in one call. Raises what zeroing
        pages raises: what they hold is not known then.
        """
        arrived = np.zeros(len(chain), bool)
        try:
            for part, some, pages in parts(chain, starts, self._passage.most_blocks):
                last = part.stop >= len(chain)
                arrived[part] = self._get(some, pages, release if last else None)
                if not arrived[part].all():
                    break
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: a load from the pool failed; its request is computed")
        if arrived.all():
            return True
        clear_pages(self._pool, starts[torch.from_numpy(~arrived)])
        return False

    def _get(
        self, chain: Chain, starts: torch.Tensor, release: Callable[[int], None] | None
    ) -> npt.NDArray[np.bool_]:
        groups = self._groups(len(starts))
        entered = 0  # layers

        def enter(number: int) -> None:
            nonlocal entered
            self._passage.enter(starts, groups[number])
            entered = groups[number].end
            assert release is not None
            release(entered)

        stages = Stages([self._passage.columns(group) for group in groups], enter)
        pieces = self._passage.pieces(starts)
        right = self._client.get(chain, pieces, None if release is None else stages)
        if entered < self._pool.layers:
            self._passage.enter(starts)
        return right

    def _groups(self, blocks: int) -> list[LayerRange]:
        """As fast as the pool has been so far."""
        pool = self._client.statistics()
        speed = pool.got_bytes / pool.get_s if pool.get_s else _FIRST_GUESS_BPS
        layer_bytes = blocks * self._pool.block_bytes / self._pool.layers
        return layer_groups(self._pool.layers, layer_bytes / speed, self._layer_s())


def parts(chain: Chain, starts: torch.Tensor, most: int) -> list[tuple[slice, Chain, torch.Tensor]]:
    """A chain and its pages in parts of at most ``most`` blocks."""
    slices = [slice(start, start + most) for start in range(0, len(chain), most)]
    return [(part, chain.part(part), starts[part]) for part in slices]
