"""Exact KV of text that was found: brought to L1 from L2 if need be, and held while it is read."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from polarkv_sglang.blend.index import Match
from polarkv_sglang.blend.plan import Piece

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_radix_cache import TreeLock, UnifiedRadixCache


class Held(NamedTuple):
    """Tokens [start, end) of a prompt, whose donor is in L1 and locked in the radix tree."""

    start: int
    end: int
    donor_start: int
    slots: torch.Tensor  # int64 [end - start]
    lock: TreeLock

    def piece(self, start: int, end: int) -> Piece:
        """Tokens [start, end) of it."""
        first = start - self.start
        return Piece(start, self.donor_start + first, self.slots[first : end - self.start])


class Gone(NamedTuple):
    """Nothing of a match is in L1 or L2 any more."""


@contextlib.contextmanager
def prefix_kept(cache: UnifiedRadixCache, request: Req) -> Iterator[None]:
    """The request's own match stays as it is while donors are brought to L1 and push others out."""
    lock = cache.lock(request.last_node)
    host = request.best_match_node
    receipt = cache.inc_host_lock_ref(host).to_dec_params() if request.host_hit_length else None
    try:
        yield
    finally:
        if receipt is not None:
            cache.dec_host_lock_ref(host, receipt)
        cache.unlock(lock)


def held_end(cache: UnifiedRadixCache, match: Match, room: float = math.inf) -> int:
    """Up to which token of the prompt a match's KV is in L1, or in L2 with at most ``room`` tokens.

    Its start if not at all.
    """
    found = cache.match_prefix(MatchPrefixParams(key=_key(cache, match)))
    here = found.device_prefix_len + (found.host_hit_length if found.host_hit_length <= room else 0)
    return int(max(match.start, min(match.end, match.start + here - match.donor_start)))


def hold(cache: UnifiedRadixCache, match: Match, room: int) -> Held | Gone | None:
    """Lock a match's donor in L1, as far as the tree has it; None if that is not as far as the match.

    What is in L2 alone is loaded, if it has at most ``room`` tokens; it arrives layer by layer while the
    next batch is computed, as SGLang's own loads do, and reading a layer waits for it.
    """
    key = _key(cache, match)
    found = cache.match_prefix(MatchPrefixParams(key=key))
    if found.device_prefix_len + found.host_hit_length <= match.donor_start:
        return Gone()
    if 0 < found.host_hit_length <= room and cache.load_back(found.best_match_node):
        found = cache.match_prefix(MatchPrefixParams(key=key))
    if found.device_prefix_len <= match.donor_start:
        return None
    lock = cache.lock(found.last_device_node)
    if lock is None:
        return None
    slots = cache.path_device_indices(found.last_device_node)[: found.device_prefix_len]
    slots = slots[match.donor_start : match.donor_end].to(torch.int64)
    return Held(match.start, match.start + len(slots), match.donor_start, slots, lock)


def _key(cache: UnifiedRadixCache, match: Match) -> RadixKey:
    """A match's donor, as the tree knows it."""
    donor, page = match.donor, cache.page_size
    # The tree knows whole pages; the last one of a match goes on with the donor's own text.
    tokens = donor.tokens[: -(-match.donor_end // page) * page]
    return RadixKey(array("q", tokens.tobytes()), donor.space.extra_key, cache_salt=donor.space.cache_salt)
