"""Rotation of cached keys against the rotary embedding itself, in double precision."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.kernels.rotate import Moves, Rotary, rotate_keys
from tests.kernels.support import bits, examples, permutation, poisoned, random_numbers, rounding

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    tokens: int
    heads: int
    dim: int
    pairs: int
    first: int = 0
    interleaved: bool = False
    base: float = 10_000.0
    dtype: torch.dtype = torch.float32

    def rotary(self, device: torch.device) -> Rotary:
        exponents = torch.arange(self.pairs, dtype=torch.float64) / self.pairs
        return Rotary((self.base**-exponents).float().to(device), self.interleaved, self.first)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.sampled_from([4, 6, 16, 24]))
    pairs = draw(st.integers(1, dim // 2))
    return Case(
        tokens=draw(st.integers(0, 9)),
        heads=draw(st.integers(1, 3)),
        dim=dim,
        pairs=pairs,
        first=2 * draw(st.integers(0, (dim - 2 * pairs) // 2)),
        interleaved=draw(st.booleans()),
        base=draw(st.sampled_from([10_000.0, 1e6])),
        dtype=draw(st.sampled_from(DTYPES)),
    )


def angles(positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """As models compute them: position times frequency, rounded to fp32."""
    return positions.cpu().float()[:, None] * rotary.frequencies.cpu()


def turned(keys: torch.Tensor, angle: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Keys [tokens, heads, dim] as doubles, the rotated dimensions turned as complex numbers by ``angle``."""
    result = keys.cpu().double()
    pairs = len(rotary.frequencies)
    for pair in range(pairs):
        real = rotary.first + (2 * pair if rotary.interleaved else pair)
        imaginary = real + (1 if rotary.interleaved else pairs)
        number = torch.complex(result[..., real], result[..., imaginary])
        number = number * torch.exp(1j * angle[:, pair].double())[:, None]
        result[..., real], result[..., imaginary] = number.real, number.imag
    return result


def straight(tokens: int, old: torch.Tensor, new: torch.Tensor, device: torch.device) -> Moves:
    """Row i to row i."""
    rows = torch.arange(tokens, device=device)
    return Moves(rows, rows, old.to(device), new.to(device))


@examples
@given(cases(), st.integers(0, 1 << 30))
def test_rotated_keys_are_exact_but_for_one_rounding_and_other_rows_stay(
    device: torch.device, case: Case, seed: int
) -> None:
    rotary = case.rotary(device)
    source = random_numbers(seed, (case.tokens + 3, case.heads, case.dim), case.dtype, device)
    target = poisoned(case.tokens + 4, case.heads, case.dim, dtype=case.dtype, device=device)
    poison = bits(target[0])
    read = permutation(seed, len(source))[: case.tokens]
    written = permutation(seed + 1, len(target))[: case.tokens]
    old, new = permutation(seed, 1000)[: case.tokens], permutation(seed + 1, 1000)[: case.tokens]

    rotate_keys(source, target, Moves(*(rows.to(device) for rows in (read, written, old, new))), rotary)

    keys = source[read.to(device)]
    expected = turned(keys, angles(new, rotary) - angles(old, rotary), rotary)
    error = (target[written.to(device)].cpu().double() - expected).abs()
    largest = keys.cpu().double().abs().amax() if case.tokens else 0.0
    assert (error <= rounding(case.dtype) * expected.abs() + 2e-6 * largest).all()
    for row in set(range(len(target))) - set(written.tolist()):
        assert torch.equal(bits(target[row]), poison)


@examples
@given(cases(), st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000))
def test_rotation_is_a_group_action(device: torch.device, case: Case, a: int, b: int, c: int) -> None:
    """From a to b and on to c is from a to c, and there and back is nothing, as far as angles are exact."""
    rotary = case.rotary(device)
    keys = random_numbers(1, (case.tokens, case.heads, case.dim), torch.float32, device)

    def moved(source: torch.Tensor, old: int, new: int) -> torch.Tensor:
        target = torch.empty_like(source)
        at = [torch.full((case.tokens,), position) for position in (old, new)]
        rotate_keys(source, target, straight(case.tokens, at[0], at[1], device), rotary)
        return target

    there = moved(keys, a, b)
    tolerance = 5e-6 + 8 * 2**-24 * max(a, b, c)
    torch.testing.assert_close(moved(there, b, c), moved(keys, a, c), atol=tolerance, rtol=0)
    torch.testing.assert_close(moved(there, b, a), keys, atol=tolerance, rtol=0)


def test_the_result_is_the_models_own_key_far_into_a_context(device: torch.device) -> None:
    """A model rounds its angles to fp32. Turned by the exact difference, keys would be off 100 times more."""
    case = Case(tokens=64, heads=2, dim=64, pairs=32)
    rotary = case.rotary(device)
    plain = random_numbers(0, (case.tokens, case.heads, case.dim), torch.float32, torch.device("cpu"))
    old = torch.arange(case.tokens) + 70_000
    new = torch.arange(case.tokens) + 130_001
    cached, fresh = (turned(plain, angles(at, rotary), rotary) for at in (old, new))
    result = torch.empty_like(plain, device=device)

    rotate_keys(cached.float().to(device), result, straight(case.tokens, old, new, device), rotary)

    exact = turned(cached, angles(new - old, rotary), rotary)
    assert (result.cpu() - fresh).abs().max() < 1e-5
    assert (exact - fresh).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_equal_positions_copy_every_bit(device: torch.device, dtype: torch.dtype, interleaved: bool) -> None:
    case = Case(tokens=3, heads=2, dim=12, pairs=4, first=2, interleaved=interleaved)
    keys = random_numbers(3, (3, 2, 12), dtype, device)
    keys[0, 0, :] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 3, dtype=dtype)
    at = torch.tensor([5, 7, 100_000])
    target = torch.empty_like(keys)
    rotate_keys(keys, target, straight(3, at, at, device), case.rotary(device))
    assert torch.equal(bits(target), bits(keys))


def test_dimensions_outside_the_rotation_copy_every_bit(device: torch.device) -> None:
    """Latent keys of MLA: 512 dimensions without a position, then 64 interleaved ones."""
    case = Case(tokens=2, heads=1, dim=576, pairs=32, first=512, interleaved=True, dtype=torch.bfloat16)
    keys = random_numbers(4, (2, 1, 576), torch.bfloat16, device)
    keys[0, 0, :2] = torch.tensor([torch.inf, -0.0])
    target = torch.empty_like(keys)
    rotate_keys(
        keys, target, straight(2, torch.tensor([1, 2]), torch.tensor([9, 4]), device), case.rotary(device)
    )
    assert torch.equal(bits(target[..., :512]), bits(keys[..., :512]))
    assert not torch.equal(target[..., 512:], keys[..., 512:])


def test_keys_turn_in_place(device: torch.device) -> None:
    case = Case(tokens=5, heads=2, dim=16, pairs=4)
    rotary = case.rotary(device)
    pool = random_numbers(5, (8, 2, 16), torch.float32, device)
    before = pool.clone()
    rows = torch.tensor([6, 0, 3, 1, 7], device=device)
    old, new = torch.arange(5, device=device), torch.arange(5, device=device) + 40
    rotate_keys(pool, pool, Moves(rows, rows, old, new), rotary)

    expected = before.clone()
    rotate_keys(before, expected, Moves(rows, rows, old, new), rotary)
    assert torch.equal(pool, expected)
    assert not torch.equal(pool, before)


def test_keys_are_read_from_a_packed_block(device: torch.device) -> None:
    """The second of three layers of K in a block of 4 tokens, as a view."""
    block = random_numbers(6, (3, 4, 2, 16), torch.bfloat16, device)
    case = Case(tokens=4, heads=2, dim=16, pairs=8, dtype=torch.bfloat16)
    moves = straight(4, torch.arange(4), torch.arange(4) + 9, device)
    targets = torch.zeros(2, 4, 2, 16, dtype=torch.bfloat16, device=device)
    rotate_keys(block[1], targets[0], moves, case.rotary(device))
    rotate_keys(block[1].clone(), targets[1], moves, case.rotary(device))
    assert torch.equal(targets[0], targets[1])
    assert targets.any()


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    keys = torch.zeros(4, 2, 8, device=device)
    at = torch.arange(4, device=device)
    moves = Moves(at, at, at, at)
    rotary = Rotary(torch.ones(2, device=device))
    with pytest.raises(ValueError, match="equal heads and dim"):
        rotate_keys(keys, keys.half(), moves, rotary)
    with pytest.raises(ValueError, match="equal heads and dim"):
        rotate_keys(keys, keys[:, :1], moves, rotary)
    with pytest.raises(ValueError, match="fp32, fp16, bf16"):
        rotate_keys(keys.to(torch.float8_e4m3fn), keys.to(torch.float8_e4m3fn), moves, rotary)
    with pytest.raises(ValueError, match="last dimension contiguous"):
        rotate_keys(keys.transpose(1, 2), keys.transpose(1, 2), moves, rotary)
    with pytest.raises(ValueError, match="target_rows is"):
        rotate_keys(keys, keys, moves._replace(target_rows=at[:3]), rotary)
    with pytest.raises(ValueError, match="new_positions is"):
        rotate_keys(keys, keys, moves._replace(new_positions=at.float()), rotary)
    with pytest.raises(ValueError, match="source is on meta"):
        rotate_keys(keys.to("meta"), keys, moves, rotary)
    with pytest.raises(ValueError, match="float32 vector"):
        rotate_keys(keys, keys, moves, Rotary(torch.ones(2, device=device, dtype=torch.float64)))
    with pytest.raises(ValueError, match="\\[6, 10\\) are not within"):
        rotate_keys(keys, keys, moves, rotary._replace(first=6))
    with pytest.raises(ValueError, match="must be even"):
        rotate_keys(keys, keys, moves, rotary._replace(first=1, interleaved=True))
