"""``polarkv bench``: what the pool does on this hardware, beside memcpy and raw UCX."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polarkv_sglang.config import format_bytes, parse_address, parse_bytes
from polarkv_sglang.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from polarkv_sglang.bench.figures import Figure
    from polarkv_sglang.bench.throughput import Row

LOG_LEVEL = "error"  # what a client logs of a node that fails, the bench says itself

_SHM = "shm"
_COLUMNS = (
    "transport",
    "op",
    "block",
    "batch",
    "GB/s",
    "low-high",
    "memcpy",
    "of memcpy",
    "UCX",
    "UCX put",
    "busy",
)
_WIDTHS = (9, 3, 9, 5, 6, 13, 6, 9, 6, 7, 6)
_SPREAD_COLUMNS = ("transport", "nodes", "get ms", "low-high", "GB/s", "low-high")
_SPREAD_WIDTHS = (9, 5, 7, 15, 6, 13)
_RIGHT = frozenset(
    {"block", "batch", "GB/s", "memcpy", "of memcpy", "UCX", "UCX put", "busy", "nodes", "get ms"}
)
_DESCRIPTION = """
Measures puts and gets of a memory node that it starts on this host, or of those that are named. Figures are
GB/s (10^9 bytes), medians over the repeats. UCX is ucx_perftest on the same transport, which moves one buffer
over and over: up to some MiB it stays in the processor's caches. UCX put is UCX's puts of the same batches,
from and to as much memory, without index, lease or checksum. busy is the same batch while another thread
of the process runs plain Python, as an engine's scheduler does.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="measure the pool against memcpy and raw UCX",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("pool", "direct"),
        default="pool",
        help="pool: puts and gets. direct: how well a load in direct mode hides behind the forward pass that "
        "needs it, with layers that only wait. Default: %(default)s.",
    )
    parser.add_argument(
        "--transport",
        nargs="+",
        metavar="NAME",
        help="shm (UCX's own choice and shared memory), cma, tcp, rdma, or all that work here. Default: all; "
        "with --nodes shm.",
    )
    parser.add_argument("--sizes", default="64KiB,1MiB,8MiB,64MiB", help="Of blocks. Default: %(default)s.")
    parser.add_argument("--batches", default="1,64,256", help="Blocks in one call. Default: %(default)s.")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="Default: %(default)s.")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        default="2GiB",
        help="For blocks, the node's and ours together; what does not fit is skipped. Default: %(default)s.",
    )
    parser.add_argument(
        "--nodes",
        metavar="A:P,B:P",
        help="Memory nodes to measure instead; blocks that they hold may be evicted for ours.",
    )
    parser.add_argument("--ucx-library", metavar="PATH", help="libucp.so.0, as for polarkv node.")
    parser.add_argument("--json", action="store_true", help="One JSON object a line.")
    parser.add_argument(
        "--pages", type=int, default=32, metavar="N", help="direct: of the prefix, 4 MiB each. Default: 32."
    )
    parser.add_argument(
        "--layer-ms",
        type=float,
        metavar="MS",
        help="direct: that a layer computes for. Default: as long as its KV takes to arrive.",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="direct: a PNG of when layers arrived and were needed."
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--index",
        action="store_true",
        help="Measure a memory node's index instead: keys found a second, and its memory for each block.",
    )
    parser.add_argument(
        "--blocks", type=int, default=1_000_000, metavar="N", help="With --index: %(default)s."
    )
    mode.add_argument(
        "--spread",
        type=int,
        metavar="N",
        help="Measure 1 to N memory nodes on this host instead: latency of a get, throughput of all.",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if everything was measured, 1 if something had to be given up."""
    for name in ("repeats", "blocks", "spread", "pages"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} is below 1")
    if args.nodes is not None and (args.index or args.spread is not None):
        raise ConfigError("--index and --spread start memory nodes of their own; leave --nodes out")
    if args.what == "direct":
        from polarkv_sglang.cli.bench_direct import run as run_direct

        return run_direct(args, lambda: _transports(args, None))
    if args.plot is not None:
        raise ConfigError("--plot draws what direct measures; write polarkv bench direct")
    if args.index:
        return _run_index(args)
    if args.spread is not None:
        return _run_spread(args)
    return _run_throughput(args)


def _run_throughput(args: argparse.Namespace) -> int:
    from polarkv_sglang.bench.throughput import Plan, Pool, measure
    from polarkv_sglang.transport.tls import client_tls

    sizes = [parse_bytes(text) for text in _listed(args.sizes, "--sizes")]
    batches = [_count(text) for text in _listed(args.batches, "--batches")]
    if min(sizes) < 1:
        raise ConfigError("--sizes has a block of 0 bytes")
    pool = None
    if args.nodes is not None:
        nodes = _listed(args.nodes, "--nodes")
        for node in nodes:
            parse_address(node)
        pool = Pool(nodes, args.token, client_tls(args.tls_cert, args.tls_key, args.tls_ca))
    plan = Plan(
        transports=_transports(args, [_SHM] if pool is not None else None),
        block_bytes=sorted(set(sizes)),
        batch_blocks=sorted(set(batches)),
        repeats=args.repeats,
        memory_bytes=_memory_bytes(args),
        ucx_library=args.ucx_library,
    )
    if not args.json:
        _print_row(_COLUMNS, _COLUMNS, _WIDTHS)
    complete = True
    for row in measure(plan, pool, _say):
        complete = complete and row.gbps is not None
        if args.json:
            print(json.dumps(_as_object(row, plan.repeats)), flush=True)
        else:
            _print_row(_as_cells(row), _COLUMNS, _WIDTHS)
    return 0 if complete else 1


def _run_index(args: argparse.Namespace) -> int:
    from polarkv_sglang.bench.figures import columns
    from polarkv_sglang.bench.index import BATCH_KEYS, measure

    found = measure(args.blocks, args.repeats, args.ucx_library)
    if args.json:
        fields: dict[str, object] = {
            "blocks": found.blocks,
            "bytes_per_block": round(found.bytes_per_block, 1),
        }
        fields |= {"batch_keys": BATCH_KEYS, "repeats": args.repeats}
        fields |= columns("keys_per_s", found.keys_per_s)
        fields |= columns("pipelined_keys_per_s", found.pipelined_keys_per_s)
        print(json.dumps(fields))
    else:
        print(f"{found.blocks:,} blocks indexed in {found.bytes_per_block:.0f} bytes each")
        for figure, how in ((found.keys_per_s, ""), (found.pipelined_keys_per_s, ", pipelined")):
            print(
                f"{figure.median:,.0f} keys/s located in batches of {BATCH_KEYS} by one client{how} "
                f"({figure.low:,.0f}-{figure.high:,.0f})"
            )
    return 0


def _run_spread(args: argparse.Namespace) -> int:
    from polarkv_sglang.bench.figures import columns
    from polarkv_sglang.bench.spread import measure, node_counts

    transports = _transports(args, None)
    if not args.json:
        _print_row(_SPREAD_COLUMNS, _SPREAD_COLUMNS, _SPREAD_WIDTHS)
    for transport in transports:
        counts = node_counts(args.spread)
        for row in measure(transport, counts, args.repeats, _memory_bytes(args), args.ucx_library):
            if args.json:
                fields: dict[str, object] = {"transport": row.transport, "nodes": row.nodes}
                fields |= columns("get_latency_ms", row.get_latency_ms) | columns("gbps", row.gbps)
                print(json.dumps(fields | {"repeats": args.repeats}), flush=True)
            else:
                cells = (row.transport, str(row.nodes), *_cells(row.get_latency_ms), *_cells(row.gbps))
                _print_row(cells, _SPREAD_COLUMNS, _SPREAD_WIDTHS)
    return 0


def _transports(args: argparse.Namespace, default: list[str] | None) -> list[str]:
    """The transports asked for; ConfigError for one that is unknown or that UCX does not offer here."""
    from polarkv_sglang.bench.throughput import TRANSPORTS
    from polarkv_sglang.bench.ucx_tools import offered_transports, offers
    from polarkv_sglang.transport import load_library

    given = args.transport if args.transport is not None else default
    asked = [name for text in given or ["all"] for name in text.split(",") if name]
    for name in asked:
        if name != "all" and name not in TRANSPORTS:
            raise ConfigError(f"--transport {name!r} is unknown; known are all, {', '.join(TRANSPORTS)}")
    try:
        offered = offered_transports(load_library(args.ucx_library))
    except TransportError as error:
        if "all" not in asked:
            return asked  # trusted: UCX itself goes on with what there is
        raise ConfigError(f"--transport all: {error}; name those that you want") from error
    for name in asked:
        if name != "all" and not offers(offered, name):
            raise ConfigError(
                f"--transport {name}: UCX offers {', '.join(offered)} here; polarkv doctor says why"
            )
    return [name for name in TRANSPORTS if name in asked or ("all" in asked and offers(offered, name))]


def _listed(text: str, flag: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{flag} is empty")
    return parts


def _count(text: str) -> int:
    from polarkv_sglang.transport.messages import MAX_KEYS

    if not text.isdecimal() or not 0 < int(text) <= MAX_KEYS:
        raise ConfigError(f"--batches {text!r} is not a number of blocks from 1 to {MAX_KEYS}")
    return int(text)


def _memory_bytes(args: argparse.Namespace) -> int:
    memory_bytes = parse_bytes(args.memory)
    if memory_bytes < 64 << 20:
        raise ConfigError(f"--memory {args.memory} is below 64 MiB; give more")
    return memory_bytes


def _say(text: str) -> None:
    print(f"polarkv bench: {text}", file=sys.stderr, flush=True)


def _as_object(row: Row, repeats: int) -> dict[str, object]:
    from polarkv_sglang.bench.figures import columns

    fields: dict[str, object] = {
        "transport": row.transport,
        "op": row.op,
        "block_bytes": row.block_bytes,
        "batch_blocks": row.batch_blocks,
    }
    for name in ("gbps", "memcpy_gbps", "ucx_gbps", "ucx_put_gbps", "busy_gbps"):
        fields |= columns(name, getattr(row, name))
    return fields | {"repeats": repeats}


def _as_cells(row: Row) -> tuple[str, ...]:
    share = f"{row.gbps.median / row.memcpy_gbps.median:.2f}" if row.gbps and row.memcpy_gbps else "-"
    return (
        row.transport,
        row.op,
        format_bytes(row.block_bytes),
        str(row.batch_blocks),
        *_cells(row.gbps),
        _cells(row.memcpy_gbps)[0],
        share,
        _cells(row.ucx_gbps)[0],
        _cells(row.ucx_put_gbps)[0],
        _cells(row.busy_gbps)[0],
    )


def _cells(figure: Figure | None) -> tuple[str, str]:
    return (
        (f"{figure.median:.2f}", f"{figure.low:.2f}-{figure.high:.2f}") if figure is not None else ("-", "-")
    )


def _print_row(cells: Sequence[str], headings: Sequence[str], widths: Sequence[int]) -> None:
    aligned = (
        cell.rjust(width) if heading in _RIGHT else cell.ljust(width)
        for cell, heading, width in zip(cells, headings, widths)
    )
    print("  ".join(aligned).rstrip(), flush=True)
