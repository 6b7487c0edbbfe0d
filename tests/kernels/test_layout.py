"""The pool as bytes: sizes, and tensors that are no pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.kernels.layout import PagedPool, alignment


def layer(slots: int = 8, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(slots, heads, dim, dtype=dtype)


def test_sizes_of_k_and_v() -> None:
    pool = PagedPool.of([[layer(dim=16)] * 3, [layer(dim=8)] * 3], page_size=4)
    assert (pool.layers, pool.slots, pool.block_bytes) == (3, 8, 3 * 4 * 2 * (16 + 8) * 2)
    assert [pool.token_bytes(part) for part in (0, 1)] == [64, 32]
    assert [pool.part_start(part) for part in (0, 1)] == [0, 3 * 4 * 64]
    assert pool.pointers.tolist() == [[tensor.data_ptr() for tensor in part] for part in pool.parts]


def test_a_pool_borrows_its_tensors() -> None:
    tensor = layer()
    pool = PagedPool.of([[tensor]], page_size=4)
    tensor.fill_(1)
    assert pool.parts[0][0].view(torch.bfloat16).eq(1).all()


@given(st.lists(st.integers(0, 1 << 40), min_size=1))
def test_alignment_is_the_widest_access_that_divides_all(numbers: list[int]) -> None:
    width = alignment(*numbers)
    assert width in (1, 2, 4, 8, 16)
    assert all(number % width == 0 for number in numbers)
    assert width == 16 or any(number % (2 * width) for number in numbers)


@pytest.mark.parametrize(
    ("parts", "page_size", "message"),
    [
        ([[layer()]], 0, "page_size is 0"),
        ([[]], 4, "tensors per part are \\[0\\]"),
        ([[layer()], [layer(), layer()]], 4, "tensors per part are \\[1, 2\\]"),
        ([[layer()]] * 3, 4, "tensors per part are \\[1, 1, 1\\]"),
        ([[layer(), layer(slots=9)]], 4, "9 slots"),
        ([[layer(), layer(dim=8)]], 4, "first of its part"),
        ([[layer(), layer(dtype=torch.float32)]], 4, "first of its part"),
        ([[layer().transpose(1, 2)]], 4, "contiguous is needed"),
        ([[layer()[:, :, ::2]]], 4, "contiguous is needed"),
        ([[layer()], [layer().to("meta")]], 4, "on meta"),
    ],
)
def test_tensors_that_are_no_pool_are_refused(
    parts: list[list[torch.Tensor]], page_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PagedPool.of(parts, page_size)
