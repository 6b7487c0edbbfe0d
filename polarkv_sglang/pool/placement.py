"""Which memory nodes hold a stripe: weighted rendezvous hashing."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import xxhash


def ranking(anchor: bytes, capacities: Mapping[str, int], count: int) -> list[str]:
    """The ``count`` best memory nodes for the stripe of ``anchor``, among those in ``capacities`` (bytes).

    The first is the stripe's home, the next ones hold its copies. A node is home to stripes in proportion to
    its capacity, and when one joins or leaves only its share moves (Thaler and Ravishankar 1998; the
    logarithm makes the weights exact): a stripe whose home leaves is at home on the second of its ranking,
    which is where its copy lies. Engines must write a node's address alike to agree.
    """

    def score(address: str) -> float:
        drawn = xxhash.xxh3_64_intdigest(anchor, seed=xxhash.xxh3_64_intdigest(address.encode()))
        return -capacities[address] / min(math.log((drawn + 0.5) / 2**64), -(2.0**-64))  # never 0

    if count == 1:
        return [max(capacities, key=score)]
    return heapq.nlargest(count, capacities, key=score)
