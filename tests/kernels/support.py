"""What the tests of the kernels share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import pytest
import torch
from hypothesis import settings

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter takes milliseconds per program of a kernel.
examples: Final = settings(max_examples=8 if INTERPRETED else 50, deadline=None)
too_slow_to_interpret: Final = pytest.mark.skipif(INTERPRETED, reason="minutes in Triton's interpreter")

POISON: Final = 0xA5


def random_bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_numbers(seed: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def permutation(seed: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with every byte POISON."""
    count = torch.Size(shape).numel()
    return (
        torch.full((count * dtype.itemsize,), POISON, dtype=torch.uint8, device=device)
        .view(dtype)
        .view(shape)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes, on the CPU: they tell -0.0 from 0.0, and NaN equals itself."""
    return tensor.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def rounding(dtype: torch.dtype) -> float:
    """How far a result that was rounded once may be off, relative to it.

    Triton's interpreter cuts fp32 to bf16 instead of rounding it.
    """
    cut = INTERPRETED and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if cut else 2)
