"""How many rounds there is time for, where servers run one after another, by what was measured so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from examples.multiturn.presets import Preset
from examples.multiturn.systems import System

# In requests with fresh histories. The last two are about the mean of all systems with an L3 on two cores.
WARM_UP = 0.125
_LATER_TURN = 0.5
_PROBES = 1.2  # of one system, see probe.py


def fitting_rounds(
    preset: Preset, systems: Sequence[System], *, spent_s: float, start_s: float, request_s: float
) -> int:
    """At most the preset's rounds, and of these as many as should end within its limit; may be 0 or less.

    The first of ``systems`` has been started, which took ``start_s`` seconds, and a fresh request takes
    ``request_s``; ``spent_s`` seconds are gone in all.
    """
    talk = preset.conversations
    if preset.limit_s is None:
        return talk.rounds
    with_l3 = sum(system.has_l3 for system in systems)
    others = len(systems) - 1
    left_s = preset.limit_s - spent_s - others * (start_s + WARM_UP * request_s)
    requests = left_s / request_s - with_l3 * _PROBES
    # Every system computes the first round, and those without an L3 all of them.
    a_round = talk.sessions * (len(systems) - with_l3 + with_l3 * _LATER_TURN)
    first_round_more = talk.sessions * with_l3 * (1 - _LATER_TURN)
    return min(talk.rounds, math.floor((requests - first_round_more) / a_round))
