"""Plans and choices: which rows, and how many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.blend.plan import Piece, Plan
from polarkv_sglang.blend.select import Selection, choose_by_deviation, choose_first, chosen_rows
from polarkv_sglang.blend.spans import Span, parts
from polarkv_sglang.blend.stages import Stage, parse_stages, require_layers
from polarkv_sglang.errors import ConfigError

PIECES = [Piece(5, 100, torch.arange(40, 50)), Piece(20, 3, torch.arange(60, 64))]


@given(st.lists(st.integers(1, 29), max_size=4, unique=True))
def test_passes_split_a_plan_and_leave_out_their_last_rows(borders: list[int]) -> None:
    plan = Plan(PIECES)
    ends = [*sorted(borders), 30]
    expected = {
        **{5 + at: (40 + at, 100 + at) for at in range(10)},
        **{20 + at: (60 + at, 3 + at) for at in range(4)},
    }
    for end in ends:
        expected.pop(end - 1, None)
    found = {}
    for first, end in zip([0, *ends], ends):
        rows = plan.rows(first, end)
        assert (rows.rows + first).tolist() == rows.new_positions.tolist()
        assert rows.rows.tolist() == sorted(rows.rows.tolist())
        found.update(zip(rows.new_positions.tolist(), zip(rows.slots.tolist(), rows.old_positions.tolist())))
    assert found == expected


def test_pieces_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 15\) and \[14, 18\) overlap"):
        Plan([PIECES[0], Piece(14, 3, torch.arange(4))])


def test_digests_tell_plans_apart() -> None:
    digests = {
        Plan(pieces).digest()
        for pieces in (
            [],
            PIECES,
            PIECES[:1],
            [PIECES[0]._replace(old_start=101), PIECES[1]],
            [PIECES[0], PIECES[1]._replace(slots=torch.arange(61, 65))],
        )
    }
    assert len(digests) == 5
    assert Plan(PIECES).digest() == Plan(list(PIECES)).digest()
    assert max(digests) < 1 << 63


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_ratio_never_chooses_fewer_rows(rows: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= chosen_rows(rows, low) <= chosen_rows(rows, high) <= rows
    assert (chosen_rows(rows, 0.0), chosen_rows(rows, 1.0)) == (0, rows)


def test_choices_are_ascending() -> None:
    assert choose_by_deviation(torch.tensor([3.0, 9.0, 1.0, 7.0]), 2).tolist() == [1, 3]
    assert choose_first(torch.tensor([0, 1, 2, 0, 1]), 3).tolist() == [0, 1, 3]


def test_stages_are_read_and_checked() -> None:
    assert parse_stages(1, 0.2, "") == (Stage(1, 0.2),)
    assert parse_stages(1, 0.2, "4:0.1,8:0.05") == (Stage(1, 0.2), Stage(4, 0.1), Stage(8, 0.05))
    for wrong in ("1:0.1", "4:0.3", "4:0.1,3:0.1", "4:x", "4", "4:-1"):
        with pytest.raises(ConfigError, match="blend_stages"):
            parse_stages(1, 0.2, wrong)
    with pytest.raises(ConfigError, match="at most 15"):
        parse_stages(1, 0.2, ",".join(f"{layer}:0.1" for layer in range(2, 40)))


def test_a_layer_that_the_model_lacks_is_named() -> None:
    require_layers(parse_stages(1, 0.2, "4:0.1"), 5)
    with pytest.raises(ConfigError, match="layer 4 is to choose tokens and the model has layers 0 to 3"):
        require_layers(parse_stages(1, 0.2, "4:0.1"), 4)


def test_a_requests_ratio_scales_all_stages() -> None:
    scaled = Selection(parse_stages(1, 0.2, "4:0.1")).with_ratio(0.4)
    assert scaled.stages == (Stage(1, 0.4), Stage(4, 0.2))


def test_ratio_one_is_a_full_prefill_whatever_the_stages() -> None:
    for first in (0.0, 0.2, 1.0):
        narrowing = Selection(parse_stages(1, first, f"4:{first / 2}"))
        assert narrowing.with_ratio(1.0).stages == (Stage(1, 1.0),)
    # An engine's ratio of 0 has no later stages to scale.
    assert Selection(parse_stages(1, 0.0, "4:0")).with_ratio(0.3).stages == (Stage(1, 0.3),)


def test_a_verdict_counts_for_settings_that_choose_alike() -> None:
    usual = Selection(parse_stages(1, 0.2, "4:0.1"))
    assert usual.with_ratio(0.4).settings() == usual.settings()
    others = [
        usual._replace(metric="k"),
        usual._replace(strategy="first"),
        Selection(parse_stages(2, 0.2, "4:0.1")),
        Selection(parse_stages(1, 0.2, "4:0.05")),
        Selection(parse_stages(1, 0.2, "")),
    ]
    assert len({each.settings() for each in [usual, *others]}) == 6


borders = st.lists(st.integers(0, 40), max_size=12).map(sorted)


@given(borders, borders)
def test_parts_of_stretches_are_their_common_tokens(one: list[int], other: list[int]) -> None:
    stretches, within = ([Span(*pair) for pair in zip(each[::2], each[1::2])] for each in (one, other))
    found = list(parts(stretches, within))
    tokens = [(stretch, at) for stretch, start, end in found for at in range(start, end)]
    expected = [
        (stretch, at)
        for stretch in stretches
        for at in range(stretch.start, stretch.end)
        if any(span.start <= at < span.end for span in within)
    ]
    assert tokens == expected
    assert all(start < end for _, start, end in found)
    assert [(each.start, each.end) for each, _, _ in parts(stretches, None)] == stretches
