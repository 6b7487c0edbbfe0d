"""``polarkv bench direct``: how well a load in direct mode hides behind the forward pass that needs it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    from polarkv_sglang.bench.direct import Overlap


def run(args: argparse.Namespace, transports: Callable[[], list[str]]) -> int:
    """Exit code 0 if everything was measured."""
    if args.nodes is not None or args.index or args.spread is not None:
        raise ConfigError("direct starts a memory node of its own; leave out --nodes, --index and --spread")
    layer_s = None if args.layer_ms is None else args.layer_ms / 1e3
    if layer_s is not None and not 0 < layer_s < 1:
        raise ConfigError(f"--layer-ms {args.layer_ms} is out of range; it must be above 0 and below 1000")
    from polarkv_sglang.bench import plot
    from polarkv_sglang.bench.direct import measure

    if args.plot is not None:
        plot.require_matplotlib()
    drawn = []
    for transport in transports():
        rows = measure(transport, args.pages, layer_s, args.repeats, args.ucx_library)
        middle = sorted(rows, key=lambda each: each.overlap_efficiency)[len(rows) // 2]
        drawn.append(middle)
        if args.json:
            for row in rows:
                print(json.dumps(_as_object(row)), flush=True)
        else:
            gain = median(each.sequential_s / each.ttft_s for each in rows)
            print(
                f"{transport}: {format_bytes(middle.bytes)} in {middle.layers} layers: transfer "
                f"{1e3 * middle.transfer_s:.1f} ms, compute {1e3 * middle.compute_s:.1f} ms, both at once "
                f"{1e3 * middle.ttft_s:.1f} ms: overlap efficiency {middle.overlap_efficiency:.2f}, "
                f"{gain:.2f} times as fast as one after the other",
                flush=True,
            )
    if args.plot is not None:
        plot.draw(drawn, args.plot)
    return 0


def _as_object(row: Overlap) -> dict[str, object]:
    fields = {
        name: [round(each, 6) for each in value] if isinstance(value, list) else value
        for name, value in row._asdict().items()
    }
    return fields | {"overlap_efficiency": row.overlap_efficiency}
