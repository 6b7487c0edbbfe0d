"""A tiny model of each architecture, and the prompts that blended passes are tried on."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.common import tiny_models
from polarkv_sglang.blend.offline import OfflineModel, Prefilled
from polarkv_sglang.blend.plan import Plan
from polarkv_sglang.blend.select import Selection
from polarkv_sglang.blend.stages import Stage
from tests.engine.servers import prompt

RATIOS = (0.0, 0.05, 0.15, 0.3, 1.0)
TAIL = 20
HEAD, ONE, TWO, QUESTION = prompt(3, 37), prompt(1, 300), prompt(2, 250), prompt(4, TAIL)
SEEN = HEAD + ONE + TWO
# The documents in the other order, each at another place, neither whole nor on a page's or chunk's border.
ASKED = HEAD[:11] + TWO + ONE[3:] + QUESTION
REUSED = len(TWO) + len(ONE) - 3


def load(architecture: str, folder: Path) -> OfflineModel:
    path = folder / architecture
    return OfflineModel(str(tiny_models.build(architecture, path, dtype=torch.float32)), max_tokens=5120)


def plan_of(donor: Prefilled) -> Plan:
    return Plan([donor.pieces(337, 587, 11), donor.pieces(40, 337, 261)])


def by(ratio: float, *later: Stage, **more: str) -> Selection:
    return Selection((Stage(1, ratio), *later), **more)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
