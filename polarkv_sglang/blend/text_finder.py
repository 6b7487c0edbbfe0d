"""Finds text of a prompt in the pool and fetches its blocks, in threads of its own."""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from polarkv_sglang.blend.arena import Arena
from polarkv_sglang.blend.index import agreeing
from polarkv_sglang.blend.publisher import PageHashes
from polarkv_sglang.blend.rolling import RollingHash, Tokens
from polarkv_sglang.blend.search import Arrived, Search, Wanted
from polarkv_sglang.blend.sightings import Sighting, decode_note, landmarks, note_key
from polarkv_sglang.blend.spans import parts
from polarkv_sglang.identity import NO_PARENT, block_keys
from polarkv_sglang.pool.blocks import Chain, leading
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport.messages import MAX_KEYS, MAX_NOTES

logger = logging.getLogger(__name__)

_THREADS: Final = 2  # searches at once; the client's lanes are one each
MOST_SEARCHES: Final = 2 * _THREADS  # that are begun: one that waits for a thread waits for one other

# Exact prefixes are read over the same lane, and must not miss for what is only alike: it is held for so many
# bytes at a time, and left for a moment in between, since its lock is not fair.
_BYTES_AT_ONCE: Final = 16 << 20
_PAUSE_S: Final = 300e-6


class _Page(NamedTuple):
    """Page hashes of a page, and of the first page of its stripe."""

    name: str
    stripe: str


class _Run:
    """Tokens [start, end) of a prompt that stand in one donor in the same order."""

    def __init__(self, start: int, end: int, shift: int, pages: dict[int, _Page]) -> None:
        self.start = start
        self.end = end
        self.shift = shift  # position in the donor less the one in the prompt
        self.pages = pages  # that have them, by their numbers in the donor

    def goes_on(self, other: _Run) -> bool:
        """Whether the other one has the same donor, as far as can be seen, and leaves out nothing between."""
        common = self.pages.keys() & other.pages.keys()
        joined = self.shift == other.shift and other.start <= self.end
        return joined and all(self.pages[number] == other.pages[number] for number in common)


class TextFinder:
    """Looks for landmarks of prompts in the pool's notes, and brings the blocks that these tell of.

    What a note says is compared with the prompt token by token; blocks are named by the hash of those very
    tokens and all before them, and checked as all that is read. Whatever is doubtful is not found. Called by
    the scheduler's thread, which never waits.
    """

    def __init__(
        self,
        client: PoolClient,
        arena: Arena,
        hash_pages: PageHashes,
        *,
        page_tokens: int,
        stripe_pages: int,
        least_tokens: int,
    ) -> None:
        self._client = client
        self.arena = arena
        self._hash_pages = hash_pages
        self._page_tokens = page_tokens
        self._stripe_pages = stripe_pages
        self._least_tokens = least_tokens  # a shorter match is not worth its blocks
        self._threads = ThreadPoolExecutor(_THREADS, "polarkv-blend-finder")

    def start(self, wanted: Wanted) -> Search:
        """Begin a search; it has settled within three deadlines of the pool's calls."""
        search = Search(wanted, self.arena, 3 * self._client.deadline_s)
        self._threads.submit(self._run, search)
        return search

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    def _run(self, search: Search) -> None:
        found: list[Arrived] = []
        try:
            if not search.settled:  # it may have waited for a thread
                found = self._find(search.wanted, search.overdue_at)
        except Exception:  # the pool can never hurt the engine
            logger.exception("PolarKV: text could not be looked for in the pool; it is computed")
        search.finish(found)

    def _find(self, wanted: Wanted, deadline: float) -> list[Arrived]:
        found: list[Arrived] = []
        try:
            for run in self._runs(wanted, deadline):
                if self._is_late(deadline):
                    break
                arrived = self._fetch(run, wanted.block_digest, deadline)
                if arrived is not None:
                    found.append(arrived)
        except Exception:
            for each in found:
                self.arena.give_back(each.rows)
            raise
        return found

    def _runs(self, wanted: Wanted, deadline: float) -> list[_Run]:
        """What notes tell of the gaps, ascending and without overlap."""
        tokens, window = wanted.tokens, wanted.naming.window
        ends = [gap.end for gap in wanted.gaps]

        def meets_a_gap(at: int) -> bool:
            first = bisect_right(ends, at)  # that ends behind the landmark's beginning
            return first < len(ends) and wanted.gaps[first].start < at + window

        places = [at for at in landmarks(RollingHash(window), tokens) if meets_a_gap(at)]
        runs: list[_Run] = []
        for first in range(0, len(places), MAX_NOTES):
            if self._is_late(deadline):
                break
            some = places[first : first + MAX_NOTES]
            keys = [note_key(wanted.naming, tokens[at : at + window]) for at in some]
            for at, key, note in zip(some, keys, self._client.read_notes(keys)):
                sighting = decode_note(key, note, wanted.naming.seed, self._page_tokens) if note else None
                run = self._match(tokens, at, window, sighting) if sighting is not None else None
                if run is None:
                    continue
                if runs and runs[-1].goes_on(run):
                    runs[-1].end = max(runs[-1].end, run.end)
                    runs[-1].pages.update(run.pages)
                    continue
                run.start = max(run.start, runs[-1].end if runs else 0)
                if run.end - run.start >= self._least_tokens:
                    runs.append(run)
        return [
            _Run(start, end, run.shift, run.pages)
            for run, start, end in parts(runs, wanted.gaps)
            if end - start >= self._least_tokens
        ]

    def _match(self, tokens: Tokens, at: int, window: int, sighting: Sighting) -> _Run | None:
        """What a sighting has in common with the prompt around a landmark at ``at``."""
        theirs, mark = sighting.tokens, sighting.landmark
        ahead = agreeing(tokens[at:], theirs[mark:])
        if ahead < window:
            return None
        behind = agreeing(tokens[:at][::-1], theirs[:mark][::-1])
        shift = sighting.start + mark - at
        names = self._hash_pages(theirs, sighting.before)
        first = sighting.start // self._page_tokens

        def page(number: int) -> _Page:
            stripe = number - number % self._stripe_pages
            return _Page(names[number - first], names[stripe - first] if stripe >= first else sighting.stripe)

        start, end = at - behind, at + ahead
        return _Run(start, end, shift, {number: page(number) for number in self._pages(start, end, shift)})

    def _pages(self, start: int, end: int, shift: int) -> range:
        """Numbers of the donor's pages that have tokens [start, end) of the prompt."""
        return range((start + shift) // self._page_tokens, -(-(end + shift) // self._page_tokens))

    def _is_late(self, deadline: float) -> bool:
        """Whether another call could take longer than anybody waits."""
        return time.monotonic() + self._client.deadline_s > deadline

    def _fetch(self, run: _Run, digest: bytes, deadline: float) -> Arrived | None:
        """The tokens of a run whose blocks come, from its first on; None if too few do."""
        pages = self._pages(run.start, run.end, run.shift)[: min(MAX_KEYS, self.arena.free)]
        if not pages:
            return None
        keys, stripes = (
            block_keys(digest, names) for names in zip(*(run.pages[number] for number in pages), strict=True)
        )
        rows = self.arena.take(len(keys))
        if rows is None:
            return None
        came = 0
        try:
            came = self._get(keys, stripes, rows, deadline)
            end = min(run.end, (pages.start + came) * self._page_tokens - run.shift)
            if end - run.start < self._least_tokens:
                came = 0
        finally:
            self.arena.give_back(rows[came:])
        return Arrived(run.start, end, run.start + run.shift, pages.start, rows[:came]) if came else None

    def _get(self, keys: list[bytes], stripes: list[bytes], rows: list[int], deadline: float) -> int:
        """How many blocks come, from the first on."""
        at_once = max(1, _BYTES_AT_ONCE // self.arena.blocks.shape[1])
        for first in range(0, len(keys), at_once):
            if first and self._is_late(deadline):
                return first
            part = slice(first, first + at_once)
            chain = Chain(keys[part], [NO_PARENT] * len(keys[part]), stripes[part])
            came = leading(self._client.get(chain, self.arena.pieces(rows[part])))
            if came < len(chain):
                return first + came
            time.sleep(_PAUSE_S)
        return len(keys)
