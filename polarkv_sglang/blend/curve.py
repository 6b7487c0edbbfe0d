"""The picture of a check: quality and speed against the ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Title, unit of the axis, and what is drawn: column, legend, colour.
_PANELS: Final = (
    ("Error of reused KV", "relative", (("v_error", "V", "#2a78d6"), ("k_error", "K", "#eb6834"))),
    ("Distance of the next token's distribution", "KL, nats", (("kl", "", "#2a78d6"),)),
    ("Next token agrees", "share of tokens", (("top1_agreement", "", "#2a78d6"),)),
    ("Speed of prefill", "times the full one's", (("cpu_speedup", "", "#2a78d6"),)),
)


def draw(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw ``rows``, one a ratio, as a PNG. Raises ImportError without matplotlib, OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    ratios = [row["ratio"] for row in rows]
    for axes, (heading, unit, lines) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for column, name, colour in lines:
            values = [row[column] for row in rows]
            axes.plot(ratios, values, color=colour, marker="o", linewidth=2, label=name)
        if len(lines) > 1:
            axes.legend(frameon=False)
        axes.set_title(heading, loc="left", fontsize=10)
        axes.set_ylabel(unit)
        axes.set_xlabel("share of reused tokens that is computed again")
        axes.set_ylim(bottom=0, top=1.05 if heading == "Next token agrees" else None)
        axes.grid(color="#e4e4e0", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=80, format="png")
