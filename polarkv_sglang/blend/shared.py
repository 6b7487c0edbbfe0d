"""Donors that other engines share: told of and found through the pool, and brought to L1 for one request."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

from polarkv_sglang.blend.arena import Arena
from polarkv_sglang.blend.index import Space
from polarkv_sglang.blend.plan import Piece
from polarkv_sglang.blend.publisher import Publisher
from polarkv_sglang.blend.rolling import Tokens
from polarkv_sglang.blend.search import Arrived, Gap, Search, Wanted
from polarkv_sglang.blend.sightings import Naming
from polarkv_sglang.blend.spans import parts
from polarkv_sglang.blend.text_finder import TextFinder
from polarkv_sglang.hicache.device_pools import DevicePool
from polarkv_sglang.kernels.pack import unpack_blocks

if TYPE_CHECKING:
    from polarkv_sglang.hicache.naming import BlockNames
    from polarkv_sglang.radix.cache import PolarRadixCache


class Landing(NamedTuple):
    """Pages of L1 that one request's donors from the pool are brought to."""

    rows: list[int]  # of the arena
    slots: torch.Tensor  # int64 [rows * page]
    page_tokens: int

    @property
    def starts(self) -> torch.Tensor:
        """First slots of the pages."""
        return self.slots[:: self.page_tokens].contiguous()


class _Cut(NamedTuple):
    """Tokens [start, end) of a prompt that are taken from what has arrived."""

    arrived: Arrived
    start: int
    end: int
    pages: range  # of its rows


class SharedDonors:
    """What Blender needs of the pool. Scheduler thread only.

    Slots that donors are brought to belong to their request alone: they enter no tree, and are free again
    once its prompt is computed.
    """

    def __init__(self, cache: PolarRadixCache, names: BlockNames, pool: DevicePool, *, writes: bool) -> None:
        """``writes``: whether this rank tells what was put. Raises TransportError."""
        config, client = cache.runtime.config, cache.runtime.client
        self._cache = cache
        self._names = names
        self._pool = pool.paged
        self._window = config.blend_chunk_tokens
        page = cache.page_size
        hash_pages = functools.partial(page_hashes, page)
        arena = Arena(client, self._pool.block_bytes, config.blend_arena_bytes, self._pool.device)
        self.finder = TextFinder(
            client,
            arena,
            hash_pages,
            page_tokens=page,
            stripe_pages=config.stripe_pages,
            least_tokens=config.blend_chunk_tokens,
        )
        self._publisher: Publisher | None = None
        if writes:
            self._publisher = Publisher(
                client, hash_pages, page_tokens=page, stripe_pages=config.stripe_pages
            )
            cache.runtime.on_stored = self._publisher.stored

    @property
    def deadline_s(self) -> float:
        """Of one of the pool's calls."""
        return self._cache.runtime.client.deadline_s

    def learn(self, tokens: Tokens, space: Space) -> None:
        """A prompt's exact KV has entered the tree."""
        naming = self._naming(space) if self._publisher is not None else None
        if naming is not None and self._publisher is not None:
            self._publisher.learn(naming, tokens)

    def search(self, tokens: Tokens, space: Space, gaps: Sequence[Gap]) -> Search | None:
        """Look for what is missing; None while nothing may be shared."""
        naming, digest = self._naming(space), self._names.digest()
        weights = self._cache.runtime.weights.current
        if naming is None or digest is None or weights is None:
            return None
        return self.finder.start(Wanted(tokens, gaps, naming, digest, weights))

    def land(
        self, arrived: Sequence[Arrived], gaps: Sequence[Gap], room: int
    ) -> tuple[list[Piece], Landing | None]:
        """Pieces for the gaps, and the pages of L1 for their KV: what ``room`` tokens hold of it.

        Deterministic, so that it is the same on all ranks that have found the same.
        """
        page = self._cache.page_size
        cuts = self._fitting(arrived, gaps, room)
        pages = sum(len(cut.pages) for cut in cuts)
        if not pages:
            return [], None
        evict_from_tree_cache(self._cache, pages * page)
        slots = self._cache.token_to_kv_pool_allocator.alloc(pages * page)
        if slots is None:
            return [], None
        slots = slots.to(torch.int64)
        pieces: list[Piece] = []
        rows: list[int] = []
        for each, start, end, numbers in cuts:
            old = each.old_start + start - each.start
            first = len(rows) * page + old % page
            pieces.append(Piece(start, old, slots[first : first + end - start]))
            rows += each.rows[numbers.start : numbers.stop]
        return pieces, Landing(rows, slots, page)

    def tokens(self, arrived: Sequence[Arrived], gaps: Sequence[Gap], room: int) -> int:
        """How many tokens ``land`` would have pieces for; changes nothing."""
        return sum(cut.end - cut.start for cut in self._fitting(arrived, gaps, room))

    def _fitting(self, arrived: Sequence[Arrived], gaps: Sequence[Gap], room: int) -> list[_Cut]:
        page = self._cache.page_size
        cuts: list[_Cut] = []
        pages = 0
        for each, start, end in _cut(arrived, gaps, self._window):
            old = each.old_start + start - each.start
            numbers = range(old // page - each.first_page, -(-(old + end - start) // page) - each.first_page)
            if (pages + len(numbers)) * page <= room:
                cuts.append(_Cut(each, start, end, numbers))
                pages += len(numbers)
        return cuts

    def enter(self, landing: Landing) -> None:
        """Bring the pages' KV to L1, on the current stream: the arena's rows are read until that is done."""
        for first, end in _stretches(landing.rows):
            row = landing.rows[first]
            blocks = self.finder.arena.blocks[row : row + end - first]
            blocks = blocks.to(self._pool.device, non_blocking=True)
            unpack_blocks(self._pool, landing.starts[first:end], blocks)

    def leave(self, landing: Landing) -> None:
        """Free the pages."""
        self._cache.token_to_kv_pool_allocator.free(landing.starts)

    def _naming(self, space: Space) -> Naming | None:
        """None while nothing may be shared. All ranks have one name for a text: the first one's notes."""
        weights = self._cache.runtime.weights.current
        if weights is None:
            return None
        first = msgspec.structs.replace(self._names.namespace(weights), tp_rank=0)
        return Naming(first.digest(), storage_namespace_seed(*space) or "", self._window)


def page_hashes(page_tokens: int, tokens: Tokens, seed: str) -> list[str]:
    """SGLang's chained hashes of the whole pages of ``tokens``, which follow ``seed``."""
    whole = tokens[: len(tokens) // page_tokens * page_tokens]
    return list(get_hash_str(whole.tolist(), seed or None, page_tokens)) if len(whole) else []


def _cut(arrived: Sequence[Arrived], gaps: Sequence[Gap], least: int) -> Iterator[tuple[Arrived, int, int]]:
    return ((each, start, end) for each, start, end in parts(arrived, gaps) if end - start >= least)


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where consecutive rows begin and end."""
    borders = [at for at, (one, other) in enumerate(pairwise(rows), 1) if other != one + 1]
    return zip([0, *borders], [*borders, len(rows)])
