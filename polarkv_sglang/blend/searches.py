"""Which requests wait for donors from the pool, and what of their prompts is looked for there."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from polarkv_sglang.blend.donors import held_end
from polarkv_sglang.blend.matches import Matches, beyond, gaps_left
from polarkv_sglang.blend.options import Wish
from polarkv_sglang.blend.search import Gap, Search
from polarkv_sglang.blend.shared import SharedDonors
from polarkv_sglang.blend.spans import Span
from polarkv_sglang.blend.text_finder import MOST_SEARCHES

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from polarkv_sglang.radix.cache import PolarRadixCache
    from polarkv_sglang.weights import WeightsIdentity

logger = logging.getLogger(__name__)


class _Sought:
    """A request's search, from when its donors were asked for."""

    def __init__(self, missing: Sequence[Gap], patience_s: float) -> None:
        self.missing = missing
        self.begun = False
        self.settled = not missing
        self.search: Search | None = None  # None: it is not begun, could not be, or is not needed any more
        self.hopeless_at = time.monotonic() + patience_s  # if it is not begun by then

    @property
    def ready(self) -> bool:
        """Whether this rank has nothing to wait for."""
        if self.begun:
            return self.search is None or self.search.settled
        return time.monotonic() >= self.hopeless_at

    def drop(self) -> None:
        if self.search is not None:
            self.search.close()
        self.search, self.settled = None, True


class Searches:
    """The searches of waiting requests, one each. Scheduler thread only.

    Every rank looks for the same requests' donors, and waits for the others: what all have found alike is
    used, anything else by none. They agree once per scheduling pass, on all searches that were asked for in
    the one before. Only a few are begun at a time, those of the requests that come first in the queue.
    """

    def __init__(
        self,
        cache: PolarRadixCache,
        matches: Matches,
        shared: SharedDonors,
        agree: Callable[[Sequence[int]], list[bool]],
        least_tokens: int,
    ) -> None:
        self._cache = cache
        self._matches = matches
        self._shared = shared
        self._agree = agree
        self._least_tokens = least_tokens
        self._sought: weakref.WeakKeyDictionary[Req, _Sought] = weakref.WeakKeyDictionary()
        # Of this pass, in the order of the queue: the same on all ranks, which the dictionary is not, since
        # requests that have left are collected at any time.
        self._asked: list[_Sought] = []
        # Searches whose requests were collected. That can happen inside any allocation, also of a thread that
        # holds a search's or the arena's lock: so the finalizer closes nothing.
        self._left: deque[Search] = deque()

    def settle(self) -> None:
        """A scheduling pass begins: see which searches are over on all ranks.

        A collective if any was asked for in the pass before and is not over.
        """
        while self._left:
            self._left.popleft().close()
        asked, self._asked = self._asked, []
        asked = [sought for sought in asked if not sought.settled]
        if not asked:
            return
        ready = [sought.ready for sought in asked]
        digests = [_digest(sought.search) if mine else 0 for sought, mine in zip(asked, ready)]
        equal = self._agree([*map(int, ready), *digests])
        for sought, mine, all_mine, alike in zip(asked, ready, equal, equal[len(asked) :]):
            sought.settled = mine and all_mine
            if sought.settled and not alike:
                sought.drop()
        if not all(sought.settled for sought in asked):
            self._cache.giving_way.give_way()

    def awaits(self, request: Req, wish: Wish) -> bool:
        """Whether the request has to wait for its search; asked once per pass and request."""
        sought = self._sought.get(request)
        if sought is None:
            sought = _Sought(self._missing(request, wish), self._shared.deadline_s)
            self._sought[request] = sought
        if sought.settled:
            return False
        if not sought.begun and len(self._asked) < MOST_SEARCHES:
            sought.begun = True
            sought.search = self._begin(request, sought.missing)
        self._asked.append(sought)
        return True

    def over(self, request: Req, weights: WeightsIdentity) -> Search | None:
        """The request's search, once it has settled, if it was for KV of these weights."""
        sought = self._sought.get(request)
        search = sought.search if sought is not None and sought.settled else None
        return search if search is not None and search.wanted.weights == weights else None

    def drop(self, request: Req) -> None:
        """What was found for a request is not needed."""
        sought = self._sought.get(request)
        if sought is not None:
            sought.drop()

    def _missing(self, request: Req, wish: Wish) -> list[Gap]:
        """What of a prompt is neither its exact prefix nor held by donors here, if it could be blended."""
        try:
            matches = self._matches.of(request, wish)
            here = [Span(match.start, held_end(self._cache, match)) for match in matches]
            gaps = gaps_left(request, here, wish)
            missing = [gap for gap in gaps if gap.end - gap.start >= self._matches.least_tokens]
            within = sum(end - start for start, end in [*missing, *here])
        except Exception:  # on all ranks alike: they have the same tree, index and request
            logger.exception("PolarKV: what to look for in the pool could not be told; it is computed")
            return []
        return missing if within >= self._least_tokens else []

    def _begin(self, request: Req, missing: Sequence[Gap]) -> Search | None:
        try:
            tokens = np.array(request.full_untruncated_fill_ids, np.int64)
            search = self._shared.search(tokens, beyond(request)[0], missing)
            if search is not None:
                weakref.finalize(request, self._left.append, search)  # it may leave while it waits
            return search
        except Exception:  # the other ranks wait for an answer, too
            logger.exception("PolarKV: text could not be looked for in the pool; it is computed")
            return None


def _digest(search: Search | None) -> int:
    """Of what has come by now; what comes later counts as not found."""
    if search is None:
        return 0
    search.freeze()
    return search.digest()
