"""Cached keys moved to other positions: rotary embedding is a rotation, so one more rotation corrects it."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from polarkv_sglang.kernels.dispatch import require_device, require_rows, require_vector, uses_triton
from polarkv_sglang.kernels.rows import put_rows, take_rows

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


class Rotary(NamedTuple):
    """Which dimensions of a key are rotated, and how fast."""

    frequencies: torch.Tensor  # float32 [pairs]: the model's inv_freq, scaled as the model scales it
    interleaved: bool = False  # pairs are neighbours (GPT-J, DeepSeek), not halves apart (NeoX)
    first: int = 0  # the rotated dimensions are [first, first + 2 * pairs); the others are copied

    @property
    def dims(self) -> int:
        return 2 * len(self.frequencies)


class Moves(NamedTuple):
    """Per token where its key lies, where it goes, and its positions there; int32 or int64 [tokens] each."""

    source_rows: torch.Tensor
    target_rows: torch.Tensor
    old_positions: torch.Tensor
    new_positions: torch.Tensor


class Turns(NamedTuple):
    """What moves turn keys by, the same in all layers: for a CPU, to make them once. [tokens, 1, pairs]"""

    cos: torch.Tensor  # float32
    sin: torch.Tensor
    still: torch.Tensor | None  # bool: where nothing turns; None: nowhere


def turns_of(moves: Moves, rotary: Rotary) -> Turns:
    """The turns of ``moves``. Angles are the model's own, each rounded to fp32, and subtracted."""
    new, old = (
        positions.float().outer(rotary.frequencies)
        for positions in (moves.new_positions, moves.old_positions)
    )
    angle = (new - old).unsqueeze(1)
    still = angle == 0
    return Turns(angle.cos(), angle.sin(), still if bool(still.any()) else None)


def rotate_keys(
    source: torch.Tensor, target: torch.Tensor, moves: Moves, rotary: Rotary, turns: Turns | None = None
) -> None:
    """Write to ``target[moves.target_rows[i]]`` the key of ``source[moves.source_rows[i]]``, rotated.

    ``source`` and ``target`` are [rows, heads, dim] of one dtype (fp32, fp16, bf16), the last dimension
    contiguous; they may be views, of a packed block for one, or the same pool if no row is both read for one
    token and written for another. Target rows must be distinct; other rows stay as they are.

    A key rotated to its old position becomes the key rotated to the new one. Angles are ``position *
    frequency`` rounded to fp32, as models compute them, and subtracted: the exact angle of ``new - old``
    would differ from the model's by up to 0.01 at positions near 100,000. The rotation is in fp32 and rounds
    once; equal positions copy bit by bit. ``turns`` are the moves', where the caller has them; a GPU makes
    its own. Raises ValueError for operands that do not fit each other.
    """
    _check(source, target, moves, rotary)
    if len(moves.source_rows) == 0:
        return
    if uses_triton(target):
        from polarkv_sglang.kernels.gpu import rotate as gpu

        gpu.rotate_keys(source, target, moves, rotary)
    else:
        rotate_keys_reference(source, target, moves, rotary, turns)


def rotate_keys_reference(
    source: torch.Tensor, target: torch.Tensor, moves: Moves, rotary: Rotary, turns: Turns | None = None
) -> None:
    """``rotate_keys`` in PyTorch."""
    cos, sin, still = turns_of(moves, rotary) if turns is None else turns
    keys = take_rows(source, moves.source_rows)
    rotated = keys[..., rotary.first : rotary.first + rotary.dims]
    if rotary.interleaved:
        one, other = rotated[..., 0::2], rotated[..., 1::2]
    else:
        one, other = rotated.chunk(2, dim=-1)
    x, y = one.float(), other.float()
    turned = x * cos - y * sin, y * cos + x * sin
    if still is not None:
        # Where nothing turns the bits stay: x * 1 - y * 0 would lose the sign of zero and spread infinities.
        turned = torch.where(still, x, turned[0]), torch.where(still, y, turned[1])
    one.copy_(turned[0])
    other.copy_(turned[1])
    put_rows(target, moves.target_rows, keys)


def _check(source: torch.Tensor, target: torch.Tensor, moves: Moves, rotary: Rotary) -> None:
    require_rows(source=source, target=target)
    if source.dtype != target.dtype or source.dtype not in _DTYPES or source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"source is {source.dtype} {list(source.shape)}, target {target.dtype} {list(target.shape)}; "
            "equal heads and dim in one of fp32, fp16, bf16 are needed"
        )
    require_vector(len(moves.source_rows), **moves._asdict())
    require_device(target.device, source=source, frequencies=rotary.frequencies, **moves._asdict())
    if rotary.frequencies.dtype != torch.float32 or not rotary.frequencies.is_contiguous():
        raise ValueError(f"frequencies are {rotary.frequencies.dtype}; a contiguous float32 vector is needed")
    if rotary.first < 0 or rotary.first + rotary.dims > source.shape[2]:
        raise ValueError(
            f"rotated dimensions [{rotary.first}, {rotary.first + rotary.dims}) are not within "
            f"the key's [0, {source.shape[2]})"
        )
    if rotary.interleaved and rotary.first % 2:
        raise ValueError(f"interleaved pairs begin at dimension {rotary.first}; it must be even")
