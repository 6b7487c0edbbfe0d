"""Which tokens of a prompt take their KV from where, and how that falls into prefill passes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """Tokens [start, start + len(slots)) of a prompt whose exact KV lies in the pool, for other positions."""

    start: int
    old_start: int  # position of the first token in the prompt that the KV was computed in
    slots: torch.Tensor  # int64 [tokens]: pool slots of the KV

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


class PassRows(NamedTuple):
    """The rows of one prefill pass that have cached KV; int64 vectors of one length, rows ascending."""

    rows: torch.Tensor  # counted from the first row of the pass
    slots: torch.Tensor  # where the cached KV lies
    old_positions: torch.Tensor  # that its keys are rotated to
    new_positions: torch.Tensor  # that they have to be rotated to
    offsets: torch.Tensor  # of the token in its piece

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PassRows:
        return PassRows(*(vector.to(device) for vector in self))


class Plan:
    """The pieces of one prompt, ascending and without overlap."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Raises ValueError for pieces that overlap or are not in order."""
        for one, other in pairwise(pieces):
            if one.end > other.start:
                raise ValueError(f"pieces [{one.start}, {one.end}) and [{other.start}, {other.end}) overlap")
        slots = [piece.slots for piece in pieces]
        # Brought to the CPU at once: for each of them it would wait for the GPU.
        here = torch.split(torch.cat(slots).cpu(), [len(each) for each in slots]) if slots else ()
        self.pieces = tuple(piece._replace(slots=each) for piece, each in zip(pieces, here))

    @property
    def tokens(self) -> int:
        """How many tokens have cached KV."""
        return sum(len(piece.slots) for piece in self.pieces)

    def digest(self) -> int:
        """63 bits that are equal for equal pieces: ranks compare them before they use a plan."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(repr((piece.start, piece.old_start)).encode() + piece.slots.numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    def rows(self, first: int, end: int) -> PassRows:
        """The cached rows of the pass that computes tokens [first, end).

        Its last token is never one of them: what follows from it is asked for.
        """
        parts = []
        for piece in self.pieces:
            start, stop = max(piece.start, first), min(piece.end, end - 1)
            if start < stop:
                offsets = torch.arange(start - piece.start, stop - piece.start)
                new_positions = offsets + piece.start
                parts.append(
                    PassRows(
                        rows=new_positions - first,
                        slots=piece.slots[start - piece.start : stop - piece.start],
                        old_positions=offsets + piece.old_start,
                        new_positions=new_positions,
                        offsets=offsets,
                    )
                )
        if not parts:
            return PassRows(*(torch.zeros(0, dtype=torch.int64) for _ in PassRows._fields))
        return PassRows(*(torch.cat(vectors) for vectors in zip(*parts)))
