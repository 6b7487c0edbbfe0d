"""Which stripes are read often enough to be worth a copy on another memory node."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

HOT_READS = 2  # a stripe that is read again is likely to be read on: system prompts, shared documents
_REMEMBERED = 1 << 16


class HotStripes:
    """Counts one rank's reads per stripe; forgets the stripes that it has not seen for longest.

    Does not see what other ranks read: a stripe that each of many ranks reads once is never hot.
    """

    def __init__(self, hot_reads: int = HOT_READS, remembered: int = _REMEMBERED) -> None:
        self._hot_reads = hot_reads
        self._remembered = remembered
        self._reads: OrderedDict[bytes, int] = OrderedDict()

    def count(self, anchors: Iterable[bytes]) -> set[bytes]:
        """Count one read of each stripe, named by its anchor; those that became hot by it, once each."""
        hot = set()
        for anchor in anchors:
            reads = self._reads.pop(anchor, 0) + 1
            self._reads[anchor] = reads
            if reads == self._hot_reads:
                hot.add(anchor)
        while len(self._reads) > self._remembered:
            self._reads.popitem(last=False)
        return hot
