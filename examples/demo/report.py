"""What the demo measured, as a table, as a summary and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

Phase = Literal["first", "after_restart"]


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one session; the l1, l2, l3 and computed tokens are those of the engine with PolarKV."""

    session: str
    turn: int
    phase: Phase
    prompt_tokens: int
    l1: int
    l2: int
    l3: int
    computed: int
    ttft_s: float  # with PolarKV
    l1_ttft_s: float  # with PolarKV, the same prompt again, after the other engine's turn
    plain_ttft_s: float  # the same SGLang without a pool
    outputs_equal: bool


def table(turns: Sequence[Turn]) -> str:
    """Aligned columns, a line per turn; times in seconds."""
    header = [
        "phase", "session", "turn", "prompt", "L1", "L2", "L3", "computed",
        "TTFT", "L1 hit", "plain", "speed-up", "equal",
    ]  # fmt: skip
    rows = [
        [
            turn.phase, turn.session, str(turn.turn), str(turn.prompt_tokens),
            str(turn.l1), str(turn.l2), str(turn.l3), str(turn.computed),
            f"{turn.ttft_s:.3f}", f"{turn.l1_ttft_s:.3f}", f"{turn.plain_ttft_s:.3f}",
            f"{turn.plain_ttft_s / turn.ttft_s:.1f}x", "yes" if turn.outputs_equal else "NO",
        ]
        for turn in turns
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    text_columns = 2
    lines = []
    for cells in (header, *rows):
        padded = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def summary(turns: Sequence[Turn], no_hit_ratios: Sequence[float]) -> str:
    """Restored against L1 hit and against plain, and what PolarKV costs without a hit."""
    played = {turn.turn for turn in turns if turn.phase == "first"}
    after = [turn for turn in turns if turn.phase == "after_restart"]
    lines = []
    for number in sorted({turn.turn for turn in after}):
        same = [turn for turn in after if turn.turn == number]
        restored = [turn for turn in same if is_restored(turn)]
        again = " again" if number in played else ""
        lines.append(
            f"turn {number}{again}, after the restart: {len(restored)} of {len(same)} restored from L3"
        )
        if restored:
            lines += [
                f"  TTFT {median(turn.ttft_s for turn in restored):.3f} s,"
                f" L1 hit {median(turn.l1_ttft_s for turn in restored):.3f} s,"
                f" plain {median(turn.plain_ttft_s for turn in restored):.3f} s (medians)",
                f"  TTFT / TTFT of an L1 hit: median {median(t.ttft_s / t.l1_ttft_s for t in restored):.2f}",
                f"  TTFT of plain / TTFT: median {median(t.plain_ttft_s / t.ttft_s for t in restored):.1f}",
            ]
    if no_hit_ratios:
        low, high = median_interval(no_hit_ratios)
        lines.append(
            f"enabled with no hit: TTFT / TTFT of plain: median {median(no_hit_ratios):.3f}"
            f" of {len(no_hit_ratios)} interleaved pairs ({low:.3f} to {high:.3f} with 95 % confidence)"
        )
    return "\n".join(lines)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of the values the median of their distribution lies with a confidence of about 95 %.

    By ranks, whatever the distribution: as many of n values are below its median as heads in n tosses of a
    coin. All of the range for fewer than eight.
    """
    ordered = sorted(values)
    outside = max(0, int(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[outside], ordered[-1 - outside]


def is_restored(turn: Turn) -> bool:
    """Whether most of the prompt came from the pool."""
    return 2 * turn.l3 > turn.prompt_tokens


def write_json(turns: Sequence[Turn], path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(turns), indent=2) + b"\n")


def read_json(path: Path) -> list[Turn]:
    """Raises msgspec.ValidationError if the file is not what write_json wrote."""
    return msgspec.json.decode(path.read_bytes(), type=list[Turn])
