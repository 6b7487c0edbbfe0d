from __future__ import annotations

import msgspec
import pytest

from examples.multiturn.duration import fitting_rounds
from examples.multiturn.scenarios import CHATBOT
from examples.multiturn.systems import SYSTEMS

ALL = [system for name, system in SYSTEMS.items() if name != "mooncake"]
LAPTOP = msgspec.structs.replace(CHATBOT.laptop, limit_s=600.0)


def fit(preset=LAPTOP, systems=ALL, *, spent_s: float = 30.0, start_s: float = 25.0, request_s: float) -> int:
    return fitting_rounds(preset, systems, spent_s=spent_s, start_s=start_s, request_s=request_s)


def test_a_fast_machine_plays_every_round_and_the_slowest_the_fewest():
    assert fit(request_s=0.5) == LAPTOP.conversations.rounds == 10
    assert fit(request_s=60.0) == LAPTOP.min_rounds == 2


def test_slower_requests_and_starts_and_more_systems_leave_fewer_rounds():
    usual = fit(request_s=6.5)
    assert 2 < usual < 10
    assert fit(request_s=9.0) < usual
    assert fit(request_s=6.5, start_s=60.0) < usual
    assert fit(request_s=6.5, systems=[*ALL, SYSTEMS["mooncake"]]) < usual
    assert fit(request_s=6.5, systems=ALL[-1:]) == 10


def test_what_fits_ends_in_time_by_the_same_reckoning():
    """Every turn of the two systems without an L3 is computed, and of the others the first round."""
    request_s, spent_s, start_s = 6.5, 30.0, 25.0
    rounds = fit(request_s=request_s)
    sessions = LAPTOP.conversations.sessions
    computed_s = request_s * sessions * (2 * rounds + 3)
    assert LAPTOP.limit_s is not None
    assert spent_s + 4 * start_s + computed_s < LAPTOP.limit_s


@pytest.mark.parametrize("missing", ["limit_s", "min_rounds"])
def test_without_a_limit_or_a_fewest_every_round_is_played(missing):
    preset = msgspec.structs.replace(LAPTOP, **{missing: None})
    assert fit(preset, request_s=60.0) == 10
