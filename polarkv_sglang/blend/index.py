"""Where text was seen before: chunks of cached prompts, found by content at any offset."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from polarkv_sglang.blend.rolling import RollingHash, Tokens


class Space(NamedTuple):
    """Within what KV may be reused: SGLang's own namespace of its radix tree."""

    extra_key: str | None
    cache_salt: str | None


class Donor:
    """A prompt whose exact KV was in the radix tree when it was added; compared by identity."""

    __slots__ = ("found", "offsets", "space", "tokens")

    def __init__(self, space: Space, tokens: Tokens, offsets: dict[int, int]) -> None:
        self.space = space
        self.tokens = tokens
        self.offsets = offsets  # of its distinct blocks by hash
        self.found = len(offsets)  # of them, how many the index finds here and nowhere else


class Match(NamedTuple):
    """Tokens [start, end) of a prompt are those of a donor at [donor_start, donor_start + end - start)."""

    start: int
    end: int
    donor: Donor
    donor_start: int

    @property
    def donor_end(self) -> int:
        return self.donor_start + self.end - self.start


class IndexStatistics(NamedTuple):
    donors: int
    blocks: int  # distinct by content
    tokens: int  # of all donors


class ChunkIndex:
    """Blocks of ``chunk_tokens`` tokens of cached prompts, by content.

    A prompt is looked up at every offset, and a block that is found is extended to both sides as far as the
    tokens agree, so chunks need neither separators nor alignment. Each content is known once, at the place
    where it was added last. Donors are forgotten least recently used first once they have more than
    ``capacity_tokens`` tokens together (8 bytes each, and about as much for the blocks' entries), and as soon
    as all their content is known elsewhere.

    Text of 2 * chunk_tokens - 1 tokens is always found, since one of the donor's blocks lies in it; shorter
    text where it happens to hold one. The index holds tokens, never KV: what it names may be gone
    from the tree.

    Fed alike it answers alike, on every rank. Scheduler thread only.
    """

    def __init__(self, chunk_tokens: int, capacity_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._capacity_tokens = capacity_tokens
        self._rolling = RollingHash(chunk_tokens)
        self._blocks: dict[Space, dict[int, tuple[Donor, int]]] = {}
        self._donors: OrderedDict[Donor, None] = OrderedDict()  # least recently used first
        self._tokens = 0
        self.changes = 0  # how often what ``find`` answers may have changed

    def statistics(self) -> IndexStatistics:
        """What the index holds now."""
        return IndexStatistics(
            len(self._donors), sum(len(blocks) for blocks in self._blocks.values()), self._tokens
        )

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._donors.clear()
        self._tokens = 0
        self.changes += 1

    def add(self, tokens: Sequence[int] | Tokens, space: Space) -> Donor | None:
        """Remember a prompt whose KV is exact and in the radix tree; None if nothing of it is new.

        Without effect if it is shorter than a chunk, or has more tokens than the index may hold.
        """
        content = np.array(tokens, np.int64)
        whole = len(content) // self.chunk_tokens * self.chunk_tokens
        if not whole or len(content) > self._capacity_tokens:
            return None
        hashes = self._rolling.hashes(content)[:: self.chunk_tokens].tolist()
        offsets = dict(zip(hashes, range(0, whole, self.chunk_tokens)))
        blocks = self._blocks.setdefault(space, {})
        if self._is_known(content, hashes[-1], blocks):
            return None
        donor = Donor(space, content, offsets)
        self.changes += 1
        self._donors[donor] = None
        self._tokens += len(content)
        for digest, offset in offsets.items():
            self._release(blocks.get(digest))
            blocks[digest] = (donor, offset)
        while self._tokens > self._capacity_tokens:
            self.remove(next(iter(self._donors)))
        return donor

    def remove(self, donor: Donor) -> None:
        """Forget a donor, such as one whose KV is gone."""
        if donor not in self._donors:
            return
        blocks = self._blocks[donor.space]
        for digest in donor.offsets:
            if digest in blocks and blocks[digest][0] is donor:
                del blocks[digest]
        if not blocks:
            del self._blocks[donor.space]  # clients choose salts: as many as they like
        self.changes += 1
        self._drop(donor)

    def find(self, tokens: Sequence[int] | Tokens, space: Space, start: int = 0) -> Iterator[Match]:
        """Matches of at least ``chunk_tokens`` tokens past ``start``, ascending and without overlap."""
        content = np.asarray(tokens, np.int64)
        blocks = self._blocks.get(space)
        if not blocks:
            return
        position = start
        for offset, digest in enumerate(self._rolling.hashes(content[start:]).tolist(), start):
            if offset < position or digest not in blocks:
                continue
            donor, donor_offset = blocks[digest]
            match = self._extended(content, offset, donor, donor_offset, position)
            if match is None:
                continue
            self._donors.move_to_end(donor)
            position = match.end
            yield match

    def _extended(
        self, content: Tokens, offset: int, donor: Donor, donor_offset: int, least: int
    ) -> Match | None:
        """The longest match around a block, not before ``least``; None if only the hashes agree."""
        ahead = agreeing(content[offset:], donor.tokens[donor_offset:])
        if ahead < self.chunk_tokens:
            return None
        behind = agreeing(content[least:offset][::-1], donor.tokens[:donor_offset][::-1])
        return Match(offset - behind, offset + ahead, donor, donor_offset - behind)

    def _is_known(self, content: Tokens, last: int, blocks: dict[int, tuple[Donor, int]]) -> bool:
        """Whether a donor begins with ``content`` and all of it is found there; it then counts as used."""
        if last not in blocks:
            return False
        donor = blocks[last][0]
        if donor.found < len(donor.offsets) or not np.array_equal(donor.tokens[: len(content)], content):
            return False
        self._donors.move_to_end(donor)
        return True

    def _release(self, place: tuple[Donor, int] | None) -> None:
        """A block is known elsewhere from now on."""
        if place is not None:
            donor = place[0]
            donor.found -= 1
            if not donor.found:
                self._drop(donor)

    def _drop(self, donor: Donor) -> None:
        del self._donors[donor]
        self._tokens -= len(donor.tokens)


def agreeing(one: Tokens, other: Tokens) -> int:
    """How many leading tokens are equal."""
    length = min(len(one), len(other))
    unequal = one[:length] != other[:length]
    return int(unequal.argmax()) if unequal.any() else length
