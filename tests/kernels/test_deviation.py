"""Deviation of rows against the formula, in double precision."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from polarkv_sglang.kernels.deviation import (
    Norm,
    Rows,
    deviation_of_sums,
    deviation_sums,
    deviation_sums_reference,
    kv_deviation,
)
from polarkv_sglang.kernels.dispatch import uses_triton
from tests.kernels.support import bits, examples, permutation, poisoned, random_numbers

NORMS: tuple[Norm, ...] = ("l1", "l2")


class Case(NamedTuple):
    tokens: int
    shapes: tuple[tuple[int, int], ...]  # (heads, dim) of V, or of V and K
    dtype: torch.dtype
    norm: Norm
    relative: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    part = st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 24, 64]))
    return Case(
        tokens=draw(st.integers(0, 40)),
        shapes=tuple(draw(st.lists(part, min_size=1, max_size=2))),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        norm=draw(st.sampled_from(NORMS)),
        relative=draw(st.booleans()),
    )


def rows_and_slots(case: Case, device: torch.device) -> tuple[list[Rows], torch.Tensor]:
    slots = permutation(case.tokens, case.tokens + 5)[: case.tokens].to(device)
    rows = [
        Rows(
            fresh=random_numbers(part, (case.tokens, *shape), case.dtype, device),
            cached=random_numbers(10 + part, (case.tokens + 5, *shape), case.dtype, device),
        )
        for part, shape in enumerate(case.shapes)
    ]
    return rows, slots


def formula(rows: list[Rows], slots: torch.Tensor, norm: Norm, relative: bool) -> torch.Tensor:
    fresh = torch.cat([part.fresh.double().flatten(1) for part in rows], dim=1)
    cached = torch.cat([part.cached[slots].double().flatten(1) for part in rows], dim=1)
    order = {"l1": 1, "l2": 2}[norm]
    deviation = torch.linalg.vector_norm(fresh - cached, ord=order, dim=1)
    return deviation / torch.linalg.vector_norm(fresh, ord=order, dim=1) if relative else deviation


@examples
@given(cases())
def test_deviation_is_the_norm_of_the_difference(device: torch.device, case: Case) -> None:
    rows, slots = rows_and_slots(case, device)
    result = kv_deviation(rows, slots, norm=case.norm, relative=case.relative)
    assert result.dtype == torch.float32
    expected = formula(rows, slots, case.norm, case.relative)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@examples
@given(cases())
def test_all_sums_are_written_and_nothing_beside_them(device: torch.device, case: Case) -> None:
    assume(case.tokens)
    rows, slots = rows_and_slots(case, device)
    room = poisoned(4, case.tokens, dtype=torch.float32, device=device)
    poison = bits(room[0])
    if uses_triton(slots):
        from polarkv_sglang.kernels.gpu import deviation as gpu

        gpu.deviation_sums(rows, slots, case.norm, room[1:3])
    else:
        deviation_sums_reference(rows, slots, case.norm, room[1:3])
    assert torch.equal(bits(room[1:3]), bits(deviation_sums(rows, slots, norm=case.norm)))
    assert torch.equal(bits(room[0]), poison)
    assert torch.equal(bits(room[3]), poison)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("relative", [False, True])
def test_sums_of_ranks_that_hold_some_heads_each_add_up(
    device: torch.device, norm: Norm, relative: bool
) -> None:
    case = Case(6, ((4, 8), (4, 8)), torch.bfloat16, norm, relative)
    rows, slots = rows_and_slots(case, device)
    ranks = []
    for heads in (slice(0, 2), slice(2, 4)):
        own = [Rows(fresh[:, heads].contiguous(), cached[:, heads].contiguous()) for fresh, cached in rows]
        ranks.append(deviation_sums(own, slots, norm=norm))
    result = deviation_of_sums(ranks[0] + ranks[1], norm=norm, relative=relative)
    torch.testing.assert_close(result, kv_deviation(rows, slots, norm=norm, relative=relative))


def test_rows_that_did_not_change_deviate_by_nothing(device: torch.device) -> None:
    cached = random_numbers(0, (9, 2, 16), torch.bfloat16, device)
    cached[4] = 0
    slots = torch.tensor([7, 4, 0], device=device)
    for relative in (False, True):
        assert not kv_deviation([Rows(cached[slots], cached)], slots, relative=relative).any()


def test_rows_may_be_longer_than_a_tile_and_lie_apart(device: torch.device) -> None:
    """Fresh V out of a projection that also holds Q and K."""
    projection = random_numbers(0, (3, 30, 128), torch.float32, device)
    rows = [Rows(projection[:, 10:20], random_numbers(1, (5, 10, 128), torch.float32, device))]
    slots = torch.tensor([4, 1, 2], dtype=torch.int32, device=device)
    torch.testing.assert_close(kv_deviation(rows, slots).double(), formula(rows, slots, "l2", False))


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    rows = Rows(torch.zeros(3, 2, 8, device=device), torch.zeros(9, 2, 8, device=device))
    slots = torch.arange(3, device=device)
    with pytest.raises(ValueError, match="'l3'"):
        kv_deviation([rows], slots, norm="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 pairs"):
        kv_deviation([], slots)
    with pytest.raises(ValueError, match="slots is"):
        kv_deviation([rows], slots[:2])
    with pytest.raises(ValueError, match="equal heads and dim"):
        kv_deviation([rows._replace(cached=rows.cached[:, :1].clone())], slots)
    with pytest.raises(ValueError, match="fp32, fp16 or bf16"):
        kv_deviation([rows._replace(cached=rows.cached.double())], slots)
    with pytest.raises(ValueError, match="contiguous rows"):
        kv_deviation([rows._replace(fresh=torch.zeros(3, 2, 16, device=device)[..., :8])], slots)
    with pytest.raises(ValueError, match="cached is on meta"):
        kv_deviation([rows._replace(cached=rows.cached.to("meta"))], slots)
