"""How far recomputed K and V rows are from the cached ones: what CacheBlend chooses rows by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch

from polarkv_sglang.kernels.dispatch import require_device, require_rows, require_vector, uses_triton

Norm = Literal["l1", "l2"]

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


class Rows(NamedTuple):
    """V (or K) of one layer, computed and cached; the numbers of a token or slot are contiguous."""

    fresh: torch.Tensor  # [tokens, heads, dim]
    cached: torch.Tensor  # [slots, heads, dim]: the pool's layer


def kv_deviation(
    rows: Sequence[Rows], slots: torch.Tensor, *, norm: Norm = "l2", relative: bool = False
) -> torch.Tensor:
    """Per token the norm of fresh minus cached, float32 [tokens].

    ``rows`` is V, or V and K: their rows count as one long row. ``slots[i]`` (int32 or int64 [tokens]) is
    where token i is cached. ``relative`` divides by the norm of the fresh row (0 / 0 is 0). Operands are
    fp32, fp16 or bf16, computed with in fp32. Raises ValueError for operands that do not fit each other.
    """
    return deviation_of_sums(deviation_sums(rows, slots, norm=norm), norm=norm, relative=relative)


def deviation_sums(rows: Sequence[Rows], slots: torch.Tensor, *, norm: Norm = "l2") -> torch.Tensor:
    """The sums under the norms, float32 [2, tokens]: of fresh minus cached, and of fresh.

    With tensor parallelism each rank sees its heads only: sums of ranks add up, norms do not. All-reduce
    these, then ``deviation_of_sums`` is the same on every rank.
    """
    _check(rows, slots, norm)
    sums = torch.empty(2, len(slots), dtype=torch.float32, device=slots.device)
    if len(slots) == 0:
        return sums
    if uses_triton(slots):
        from polarkv_sglang.kernels.gpu import deviation as gpu

        gpu.deviation_sums(rows, slots, norm, sums)
    else:
        deviation_sums_reference(rows, slots, norm, sums)
    return sums


def deviation_of_sums(sums: torch.Tensor, *, norm: Norm = "l2", relative: bool = False) -> torch.Tensor:
    """``kv_deviation`` from its sums."""
    deviation = sums[0]
    if relative:
        deviation = torch.where(deviation == 0, 0.0, deviation / sums[1])
    return deviation.sqrt() if norm == "l2" else deviation


def deviation_sums_reference(
    rows: Sequence[Rows], slots: torch.Tensor, norm: Norm, sums: torch.Tensor
) -> None:
    """``deviation_sums`` in PyTorch."""
    sums.zero_()
    for fresh, cached in rows:
        exact = fresh.float().flatten(1)
        difference = exact - cached[slots].float().flatten(1)
        for total, row in zip(sums, (difference, exact)):
            total += row.square().sum(1) if norm == "l2" else row.abs().sum(1)


def _check(rows: Sequence[Rows], slots: torch.Tensor, norm: str) -> None:
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm is {norm!r}; 'l1' or 'l2' is needed")
    if len(rows) not in (1, 2):
        raise ValueError(f"{len(rows)} pairs of rows were given; V, or V and K, are needed")
    for fresh, cached in rows:
        require_rows(fresh=fresh, cached=cached)
        require_vector(len(fresh), slots=slots)
        require_device(slots.device, fresh=fresh, cached=cached)
        for name, tensor in (("fresh", fresh), ("cached", cached)):
            if not tensor[:1].is_contiguous():
                raise ValueError(f"{name} has strides {list(tensor.stride())}; contiguous rows are needed")
        if fresh.shape[1:] != cached.shape[1:] or not {fresh.dtype, cached.dtype} <= {*_DTYPES}:
            raise ValueError(
                f"fresh is {fresh.dtype} {list(fresh.shape)}, cached {cached.dtype} {list(cached.shape)}; "
                "equal heads and dim in fp32, fp16 or bf16 are needed"
            )
