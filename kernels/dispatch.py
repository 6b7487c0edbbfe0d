"""Who computes: Triton on a GPU, PyTorch on a CPU."""

from __future__ import annotations

import os

import torch


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether a kernel whose operands lie where ``tensor`` does runs in Triton.

    On a GPU it does. On a CPU only in Triton's interpreter, that is with TRITON_INTERPRET=1 in the
    environment when the process starts: slow, meant for tests of the kernels. Nothing here imports Triton
    before this is true.
    """
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def require_device(device: torch.device, **operands: torch.Tensor) -> None:
    """Raise ValueError that names the first operand that is not on ``device``."""
    for name, operand in operands.items():
        if operand.device != device:
            raise ValueError(f"{name} is on {operand.device}, the other operands on {device}; move it there")


def require_vector(length: int, **operands: torch.Tensor) -> None:
    """Raise ValueError that names the first operand that is not a contiguous integer vector of ``length``."""
    for name, operand in operands.items():
        integer = operand.dtype in (torch.int32, torch.int64)
        if operand.shape != (length,) or not integer or not operand.is_contiguous():
            raise ValueError(
                f"{name} is {operand.dtype} {list(operand.shape)}; a contiguous int32 or int64 vector of "
                f"{length} is needed"
            )


def require_rows(**operands: torch.Tensor) -> None:
    """Raise ValueError that names the first operand that is not [rows, heads, dim] with contiguous rows."""
    for name, operand in operands.items():
        if operand.dim() != 3 or operand.stride(2) != 1:
            raise ValueError(
                f"{name} has shape {list(operand.shape)} and strides {list(operand.stride())}; "
                "[rows, heads, dim] with the last dimension contiguous is needed"
            )
