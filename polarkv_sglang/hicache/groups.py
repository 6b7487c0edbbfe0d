"""Which layers of a load come together."""

from __future__ import annotations

import math
from typing import Final

from polarkv_sglang.kernels.layout import LayerRange

# Of transfer in a group, at least: each costs a call and, where the node puts, an exchange of messages.
_LEAST_S: Final = 1e-3
# Of the time that the last group is computed with, so much is planned for the next one's transfer.
_SHARE: Final = 0.8


def layer_groups(layers: int, transfer_s: float, compute_s: float) -> list[LayerRange]:
    """Groups of layers that take ``transfer_s`` each to come, and ``compute_s`` each to compute with.

    The first is as small as is worth a call, since the forward pass waits for all of it. Every further one is
    as large as comes while the pass computes with the one before, so that it waits no more. Where layers come
    more slowly than the pass computes, it waits for each group; then all are small, so that little is left to
    compute when the last has come. ``compute_s`` may be 0, which is not known yet.
    """
    if layers * transfer_s <= _LEAST_S:
        return [LayerRange(0, layers)]
    least = max(1, math.ceil(_LEAST_S / transfer_s))
    groups: list[LayerRange] = []
    start, size = 0, least
    while start < layers:
        groups.append(LayerRange(start, min(start + size, layers)))
        start += size
        size = max(least, int(_SHARE * size * compute_s / transfer_s))
    return groups
