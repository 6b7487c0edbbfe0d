"""``polarkv status``: what the memory nodes of a pool say of themselves."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError, NodeError
from polarkv_sglang.transport.control import ControlConnection, NodeRefused
from polarkv_sglang.transport.messages import NodeStatistics, Statistics

DEADLINE_S = 3.0
_HEADINGS = (
    "node", "state", "capacity", "used", "blocks", "hit rate", "leases", "evictions", "corrupt", "version",
)  # fmt: skip


class NodeStatus(NamedTuple):
    address: str
    state: str  # "up", "refused: why" or "unreachable: why"
    statistics: NodeStatistics | None  # None unless up


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser("status", help="show the memory nodes of a pool")
    parser.add_argument(
        "nodes", nargs="+", metavar="HOST:PORT", help="Memory nodes; commas separate as well."
    )
    parser.add_argument("--json", action="store_true", help="Print everything the nodes tell, as JSON.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every node is up, else 1."""
    addresses = [address for text in args.nodes for address in text.split(",") if address]
    if not addresses:
        raise ConfigError("no memory node is named; write host:port, such as 10.0.0.4:7411")
    with ThreadPoolExecutor(min(32, len(addresses))) as threads:
        found = list(threads.map(lambda address: ask(address, args.token), addresses))
    print(_as_json(found) if args.json else _as_table(found))
    return 0 if all(status.statistics is not None for status in found) else 1


def ask(address: str, token: str | None) -> NodeStatus:
    """The state of one node; never raises NodeError."""
    try:
        with ControlConnection.connect(
            address, token=token, role="observer", client="polarkv status", deadline_s=DEADLINE_S
        ) as connection:
            return NodeStatus(address, "up", connection.request(Statistics(connection.next_id()), DEADLINE_S))
    except NodeError as error:
        kind = "refused" if isinstance(error, NodeRefused) else "unreachable"
        reason = str(error).removeprefix(f"memory node {address} ")
        reason = reason.removeprefix("refused us: ").removeprefix("cannot be reached: ")
        return NodeStatus(address, f"{kind}: {reason}", None)


def _as_json(found: list[NodeStatus]) -> str:
    rows = []
    for status in found:
        row: dict[str, object] = {"node": status.address, "state": status.state}
        if status.statistics is not None:
            row |= msgspec.structs.asdict(status.statistics) | {"node_id": status.statistics.node_id.hex()}
            del row["request_id"]
        rows.append(row)
    return json.dumps(rows, indent=2)


def _as_table(found: list[NodeStatus]) -> str:
    rows = [_HEADINGS, *(_row(status) for status in found)]
    # A reason may be long, and nothing follows it: it does not widen its column.
    widths = [max(len(row[column]) for row in rows if len(row) > 2) for column in range(len(_HEADINGS))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(status: NodeStatus) -> tuple[str, ...]:
    now = status.statistics
    if now is None:
        return (status.address, status.state)
    asked = now.hits_total + now.misses_total
    return (
        status.address,
        status.state,
        format_bytes(now.capacity_bytes),
        format_bytes(now.used_bytes),
        str(now.blocks),
        f"{now.hits_total / asked:.1%}" if asked else "-",
        str(now.leases),
        str(now.evictions_total),
        str(now.corrupt_total),
        now.version,
    )
