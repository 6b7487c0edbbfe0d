"""Rows of a pool's layer picked and placed by slot.

On a CPU by numpy: torch indexes element by element and splits that over all threads, which takes several
times as long, and much more where the cores are busy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def take_rows(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``source[rows]``: a copy of [rows, heads, dim], of a view too."""
    if source.device.type != "cpu":
        return source[rows]
    return torch.from_numpy(_plain(source)[rows.numpy()]).view(source.dtype)


def put_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """``target[rows] = values``; rows are distinct, dtypes equal."""
    if target.device.type != "cpu":
        target[rows] = values
    else:
        _plain(target)[rows.numpy()] = _plain(values)


def _plain(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The same memory, as numpy knows it: it has no bfloat16."""
    bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    array: npt.NDArray[np.generic] = bits.detach().numpy()
    return array
