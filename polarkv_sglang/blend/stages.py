"""From which layer on how many of the reused tokens are computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal, NamedTuple

from polarkv_sglang.errors import ConfigError

# What the distance of a row is measured in: values, keys, or both as one long row.
Metric = Literal["v", "k", "kv"]
# By that distance at the check layer, or the first tokens of every piece, whatever they are.
Strategy = Literal["deviation", "first"]

MAX_STAGES: Final = 16


class Stage(NamedTuple):
    """From ``layer`` on, ``ratio`` of the rows with cached KV are computed."""

    layer: int
    ratio: float


def parse_stages(check_layer: int, ratio: float, narrowing: str) -> tuple[Stage, ...]:
    """The check layer, and what ``narrowing``, such as ``4:0.1,8:0.05``, adds to it.

    Raises ConfigError for anything but ascending layers with ratios that do not rise.
    """
    stages = [Stage(check_layer, ratio)]
    for part in narrowing.split(",") if narrowing else ():
        layer, _, share = part.partition(":")
        try:
            stages.append(Stage(int(layer), float(share)))
        except ValueError as error:
            raise ConfigError(
                f"blend_stages has {part!r}; write LAYER:RATIO,... such as 4:0.1,8:0.05"
            ) from error
    for one, other in pairwise(stages):
        if other.layer <= one.layer or not 0 <= other.ratio <= one.ratio:
            raise ConfigError(
                f"blend_stages goes from {one.layer}:{one.ratio} to {other.layer}:{other.ratio}; layers must "
                "rise (from blend_check_layer on) and ratios must not (from blend_ratio on)"
            )
    if len(stages) > MAX_STAGES:
        raise ConfigError(
            f"blend_stages has {len(stages) - 1} stages; at most {MAX_STAGES - 1} are supported"
        )
    return tuple(stages)


def require_layers(stages: tuple[Stage, ...], layers: int) -> None:
    """Raise ConfigError where a model of ``layers`` layers does not have the last stage's."""
    if stages[-1].layer >= layers:
        raise ConfigError(
            f"layer {stages[-1].layer} is to choose tokens and the model has layers 0 to {layers - 1}; lower "
            "blend_check_layer or blend_stages"
        )
