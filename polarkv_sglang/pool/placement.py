"""Which memory node holds a stripe: weighted rendezvous hashing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import xxhash


def place(anchor: bytes, capacities: Mapping[str, int]) -> str:
    """The memory node, among the addresses in ``capacities`` (bytes), that holds the stripe of ``anchor``.

    A node gets stripes in proportion to its capacity, and when one joins or leaves only its share
    moves (Thaler and Ravishankar 1998; the logarithm makes the weights exact). Engines must write
    a node's address alike to agree.
    """

    def score(address: str) -> float:
        drawn = xxhash.xxh3_64_intdigest(anchor, seed=xxhash.xxh3_64_intdigest(address.encode()))
        return -capacities[address] / math.log((drawn + 0.5) / 2**64)

    return max(capacities, key=score)
