"""Which of the rows with cached KV a pass recomputes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from polarkv_sglang.blend.stages import Metric, Stage, Strategy, parse_stages
from polarkv_sglang.kernels.deviation import deviation_of_sums

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from polarkv_sglang.config import PolarConfig


class Selection(NamedTuple):
    """How rows are chosen; equal on all ranks."""

    stages: tuple[Stage, ...]  # ascending layers from 1 on, ratios that do not rise
    metric: Metric = "v"
    strategy: Strategy = "deviation"

    def with_ratio(self, ratio: float) -> Selection:
        """The same with another ratio at the check layer; later stages narrow by the same factors.

        At ratio 1 there are none: it is a full prefill. Nor are there where ours is 0, which has no factors.
        """
        later = [] if ratio == 1 else [Stage(layer, ratio * factor) for layer, factor in self.factors]
        return self._replace(stages=(Stage(self.stages[0].layer, ratio), *later))

    @property
    def factors(self) -> list[tuple[int, float]]:
        """Layers of the later stages, and what share of the first one's rows they compute."""
        first = self.stages[0].ratio
        return [(stage.layer, stage.ratio / first) for stage in self.stages[1:]] if first else []

    def settings(self) -> str:
        """How rows are chosen at any ratio, as text that differs where that does."""
        narrowing = ",".join(f"{layer}:{factor:.6g}" for layer, factor in self.factors)
        return f"{self.stages[0].layer} {narrowing} {self.metric} {self.strategy}"


def selection_of(config: PolarConfig) -> Selection:
    """What an engine's settings say."""
    stages = parse_stages(config.blend_check_layer, config.blend_ratio, config.blend_stages)
    return Selection(stages, config.blend_metric, config.blend_strategy)


def chosen_rows(cached_rows: int, ratio: float) -> int:
    """How many of so many rows a ratio is: rounded to the nearest, never fewer for a higher ratio."""
    return min(cached_rows, math.floor(ratio * cached_rows + 0.5))


def choose_by_deviation(deviation: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest, ascending; int64."""
    return deviation.topk(count).indices.sort().values


def choose_together(sums: torch.Tensor, count: int, group: GroupCoordinator) -> torch.Tensor:
    """The choice of a tensor-parallel group, each of whose ranks has the ``deviation_sums`` of its own heads.

    The same on every rank: shares are added up, and where ranks should round otherwise, the first one's
    choice is everybody's. A collective.
    """
    if group.world_size == 1:
        return choose_by_deviation(deviation_of_sums(sums), count)
    chosen = choose_by_deviation(deviation_of_sums(group.all_reduce(sums)), count)
    first: torch.Tensor = group.broadcast(chosen, src=0)
    return first


def choose_first(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` tokens that are nearest to the start of their pieces, ascending; int64."""
    return offsets.argsort(stable=True)[:count].sort().values
