"""When each layer of a load arrived, and when the forward pass asked for it, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polarkv_sglang.bench.direct import Overlap
from polarkv_sglang.errors import ConfigError


def require_matplotlib() -> None:
    """Raises ConfigError, best before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--plot needs matplotlib: pip install 'polarkv-sglang[examples]' ({error})"
        ) from error


def draw(rows: Sequence[Overlap], path: Path) -> None:
    """A PNG with a panel for each row. Raises ConfigError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.4 * len(rows), 3.4), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, row in zip(panels, rows, strict=True):
        layers = range(row.layers)
        panel.step(layers, [1e3 * each for each in row.arrived_s], where="mid", label="arrived")
        panel.plot(layers, [1e3 * each for each in row.needed_s], ".", label="asked for")
        panel.set_title(f"{row.transport}, overlap efficiency {row.overlap_efficiency:.2f}", fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("ms since the load began")
    panels[0].legend(loc="upper left", frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error
