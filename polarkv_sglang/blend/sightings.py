"""Where text was computed, told so that any engine finds it again: notes in the pool, by content.

Text is cut where its own tokens say so: a window of tokens whose rolling hash has a certain form is a
landmark, wherever it stands, so who wrote a note and who looks for it come upon the same ones. A note tells
what stands around a landmark and which blocks hold its KV. It vouches for nothing of the text: tokens are
compared one by one, and the blocks' names are computed from these very tokens. Only where they stood in their
prompt is believed: no hash binds that position, but for a prompt's beginning. A wrong one would turn the keys
of the right text by a wrong angle; whoever can write notes could as well write wrong blocks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np
import xxhash

from polarkv_sglang.blend.rolling import RollingHash, Tokens
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.transport.messages import MAX_NOTE_BYTES

# One window in so many is a landmark; a power of two.
_SPACING: Final = 64
_SHIFT: Final = np.uint64(64 - _SPACING.bit_length() + 1)
# Tokens before and behind a landmark that its note tells at most, but for whole pages.
_REACH: Final = 256
_CHECKSUM_BYTES: Final = 8
_PAGE_HASH: Final = re.compile(r"([0-9a-f]{64})?")


class Sighting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whole pages of a prompt whose exact KV was put in the pool."""

    start: int  # position of the first token in its prompt
    before: str  # chained page hash of the page before, or of the namespace (SGLang's); empty: none
    stripe: str  # page hash of the first page of the stripe that the first page is in; empty: that page's own
    landmark: int  # offset of the window among the tokens
    text: bytes  # tokens, u32 little-endian

    @property
    def tokens(self) -> Tokens:
        return np.frombuffer(self.text, "<u4").astype(np.int64)


class Naming(NamedTuple):
    """Within what sightings are shared."""

    digest: bytes  # of the namespace that the first rank's blocks are named in
    seed: str  # SGLang's page hash of salt and extra key, empty without
    window: int  # tokens of a landmark


class Written(NamedTuple):
    """A note, once the block of its last page is in the pool."""

    key: bytes
    note: bytes
    last_page: str  # page hash


def landmarks(rolling: RollingHash, tokens: Tokens) -> list[int]:
    """Offsets of the windows that are landmarks, ascending; of those that overlap by half, the first."""
    found: list[int] = []
    for offset in np.flatnonzero(rolling.hashes(tokens) >> _SHIFT == 0).tolist():
        if not found or offset >= found[-1] + rolling.window // 2:
            found.append(offset)
    return found


def note_key(naming: Naming, window: Tokens) -> bytes:
    """The key of a landmark's note. SHA-256: a tenant must not be able to make two texts collide."""
    text = window.astype("<u4").tobytes()
    whole = b"polarkv-sighting\0" + naming.digest + naming.seed.encode() + b"\0" + text
    return hashlib.sha256(whole).digest()[:KEY_BYTES]


def sightings(
    naming: Naming, rolling: RollingHash, tokens: Tokens, pages: list[str], page_tokens: int, stripe: int
) -> Iterator[Written]:
    """What can be told of a prompt whose whole pages have the page hashes ``pages``; stripes are in pages.

    A landmark that is not in whole pages, or whose note would be too long, is left out.
    """
    whole = len(pages) * page_tokens
    marks = landmarks(rolling, tokens)
    for before, at, after in zip([0, *marks], marks, [*marks[1:], whole]):
        first = max(before, at - _REACH) // page_tokens
        end = min(after, at + _REACH) + rolling.window
        last = min(len(pages), -(-end // page_tokens))
        if at + rolling.window > last * page_tokens:
            continue
        start = first * page_tokens
        sighting = Sighting(
            start=start,
            before=pages[first - 1] if first else naming.seed,
            stripe=pages[first - first % stripe] if first % stripe else "",
            landmark=at - start,
            text=tokens[start : last * page_tokens].astype("<u4").tobytes(),
        )
        key = note_key(naming, tokens[at : at + rolling.window])
        note = encode_note(key, sighting)
        if len(note) <= MAX_NOTE_BYTES:
            yield Written(key, note, pages[last - 1])


def encode_note(key: bytes, sighting: Sighting) -> bytes:
    """The bytes of a note under ``key``."""
    content = msgspec.msgpack.encode(sighting)
    return _checksum(key, content) + content


def decode_note(key: bytes, note: bytes, seed: str, page_tokens: int) -> Sighting | None:
    """What a note under ``key`` says; None if it is none, or not what was written, or of other pages.

    ``seed`` is what the page hashes of the namespace begin with: at position 0, and nowhere else.
    """
    content = note[_CHECKSUM_BYTES:]
    if note[:_CHECKSUM_BYTES] != _checksum(key, content):
        return None
    try:
        sighting = msgspec.msgpack.decode(content, type=Sighting)
    except msgspec.MsgspecError:
        return None
    pages, rest = divmod(len(sighting.text), 4 * page_tokens)
    fits = pages > 0 and not rest and sighting.start >= 0 and sighting.start % page_tokens == 0
    named = all(_PAGE_HASH.fullmatch(name) for name in (sighting.before, sighting.stripe))
    placed = (sighting.start == 0) == (sighting.before == seed)
    return sighting if fits and named and placed and sighting.landmark >= 0 else None


def _checksum(key: bytes, content: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key + content)
