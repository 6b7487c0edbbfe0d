"""Figures with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """One quantity, measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure | None:
        """None for no samples."""
        return cls(statistics.median(samples), min(samples), max(samples)) if samples else None


def columns(name: str, figure: Figure | None) -> dict[str, float | None]:
    """A figure as fields of a JSON object: ``name``, ``name_min`` and ``name_max``."""
    if figure is None:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    rounded = [float(f"{value:.4g}") for value in figure]
    return {name: rounded[0], f"{name}_min": rounded[1], f"{name}_max": rounded[2]}
