"""Stretches of a prompt, and what of some lies in others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar


class Span(NamedTuple):
    """Tokens [start, end) of a prompt."""

    start: int
    end: int


class Stretch(Protocol):
    """Whatever has a beginning and an end in a prompt."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


S = TypeVar("S", bound=Stretch)


def parts(stretches: Iterable[S], within: Sequence[Stretch] | None) -> Iterator[tuple[S, int, int]]:
    """What of ``stretches`` lies in ``within`` (None: everywhere): each with where a part of it is.

    Both are ascending and without overlap, and so are the parts. One walk over both: a prompt may have a
    thousand of each.
    """
    first = 0
    for stretch in stretches:
        if within is None:
            yield stretch, stretch.start, stretch.end
            continue
        while first < len(within) and within[first].end <= stretch.start:
            first += 1
        at = first
        while at < len(within) and within[at].start < stretch.end:
            start, end = max(stretch.start, within[at].start), min(stretch.end, within[at].end)
            if start < end:
                yield stretch, start, end
            at += 1
