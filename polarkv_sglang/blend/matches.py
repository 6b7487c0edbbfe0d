"""What of waiting prompts donors in this engine have, and what is left to look for elsewhere."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from polarkv_sglang.blend.index import ChunkIndex, Match, Space
from polarkv_sglang.blend.options import Wish
from polarkv_sglang.blend.search import Gap
from polarkv_sglang.blend.spans import Stretch, parts

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Each is a walk down the radix tree, in the scheduler's thread; what else is known of a prompt is computed.
MOST_MATCHES: Final = 64


class _Found(NamedTuple):
    """A prompt's matches in one state of the index, past a certain exact prefix."""

    state: tuple[int, int]
    matches: list[Match]


class Matches:
    """The matches of waiting prompts, each looked up once, and again once the index or its prefix changed.

    The same on all ranks that ask alike. Scheduler thread only.
    """

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._found: weakref.WeakKeyDictionary[Req, _Found] = weakref.WeakKeyDictionary()

    @property
    def least_tokens(self) -> int:
        """Fewer are never a match."""
        return self._index.chunk_tokens

    def of(self, request: Req, wish: Wish) -> list[Match]:
        """Past the request's exact prefix, ascending; at most 64, those with most tokens in its spans."""
        space, known = beyond(request)
        state = self._index.changes, known
        found = self._found.get(request)
        if found is None or found.state != state:
            matches = list(self._index.find(request.full_untruncated_fill_ids, space, known))
            wanted: Counter[int] = Counter()  # tokens, by the match's start
            for match, start, end in parts(matches, wish.spans):
                wanted[match.start] += end - start
            most = {start for start, _ in wanted.most_common(MOST_MATCHES)}
            found = _Found(state, [match for match in matches if match.start in most])
            self._found[request] = found
        return found.matches


def beyond(request: Req) -> tuple[Space, int]:
    """Where a request's donors are looked for, and from which token on: past its exact prefix."""
    known = int(request.prefix_len + request.host_hit_length)
    return Space(request.extra_key, request.cache_salt), known


def gaps_left(request: Req, here: Sequence[Stretch], wish: Wish) -> list[Gap]:
    """What may be reused of a prompt past its exact prefix, but for ``here``, which is ascending.

    Never its last token: what follows from it is asked for.
    """
    end = len(request.full_untruncated_fill_ids) - 1
    borders = [beyond(request)[1], *(border for each in here for border in (each.start, each.end)), end]
    gaps = [Gap(one, other) for one, other in zip(borders[::2], borders[1::2]) if one < other]
    return [Gap(start, stop) for _, start, stop in parts(gaps, wish.spans)]
