"""``polarkv status``: what the memory nodes of a pool say of themselves, and what its clients say of them."""

from __future__ import annotations

import argparse
import json
import ssl
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError, NodeError

if TYPE_CHECKING:
    from polarkv_sglang.transport.messages import NodeStatistics

DEADLINE_S = 3.0
_HEADINGS = (
    "node", "out at", "state", "capacity", "used", "blocks", "hit rate", "leases", "evictions", "corrupt",
    "version",
)  # fmt: skip
_MAX_NAMES = 4  # clients named for one reason

Views = Mapping[str, Mapping[str, str]]  # client -> memory node that it cannot use -> why


class NodeStatus(NamedTuple):
    address: str
    state: str  # "up", "refused: why" or "unreachable: why"
    statistics: NodeStatistics | None  # None unless up


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "status",
        help="show the memory nodes of a pool",
        description="Shows what memory nodes say of themselves, and at how many clients each is out (their "
        "circuit breakers) and why. Exit code 0 if every node is up, else 1.",
    )
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
    from polarkv_sglang.transport.tls import client_tls

    tls = client_tls(args.tls_cert, args.tls_key, args.tls_ca)
    with ThreadPoolExecutor(min(32, len(addresses))) as threads:
        found = list(threads.map(lambda address: ask(address, args.token, tls), addresses))
    views = merge_views(status.statistics.views for status in found if status.statistics is not None)
    print(_as_json(found, views) if args.json else _as_table(found, views))
    return 0 if all(status.statistics is not None for status in found) else 1


def ask(address: str, token: str | None, tls: ssl.SSLContext | None) -> NodeStatus:
    """The state of one node; never raises NodeError."""
    from polarkv_sglang.transport.control import ControlConnection, NodeRefused
    from polarkv_sglang.transport.messages import Statistics

    try:
        with ControlConnection.connect(
            address, token=token, tls=tls, role="observer", client="polarkv status", deadline_s=DEADLINE_S
        ) as connection:
            return NodeStatus(address, "up", connection.request(Statistics(connection.next_id()), DEADLINE_S))
    except NodeError as error:
        kind = "refused" if isinstance(error, NodeRefused) else "unreachable"
        reason = str(error).removeprefix(f"memory node {address} ")
        reason = reason.removeprefix("refused us: ").removeprefix("cannot be reached: ")
        return NodeStatus(address, f"{kind}: {reason}", None)


def merge_views(views_of_nodes: Iterable[Views]) -> dict[str, dict[str, str]]:
    """One view for each client, out of what it told to every memory node.

    Nodes name a client by what it calls itself and where its connection comes from; the port there is another
    at every node, so it goes.
    """
    merged: dict[str, dict[str, str]] = {}
    for views in views_of_nodes:
        for client, out in views.items():
            name, separator, port = client.rpartition(":")
            merged.setdefault(name if separator and port.isdecimal() else client, {}).update(out)
    return merged


def _out_at(address: str, views: Views) -> dict[str, str]:
    """The clients at which a node is out, and why."""
    return {client: out[address] for client, out in sorted(views.items()) if address in out}


def _as_json(found: Sequence[NodeStatus], views: Views) -> str:
    rows = []
    for status in found:
        row: dict[str, object] = {"node": status.address, "state": status.state}
        row |= {"out_at": _out_at(status.address, views), "clients": len(views)}
        if status.statistics is not None:
            row |= msgspec.structs.asdict(status.statistics) | {"node_id": status.statistics.node_id.hex()}
            del row["request_id"]
        rows.append(row)
    return json.dumps(rows, indent=2)


def _as_table(found: Sequence[NodeStatus], views: Views) -> str:
    rows = [_HEADINGS, *(_row(status, views) for status in found)]
    # A state that is not "up" is long, and nothing follows it: it does not widen its column.
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(_HEADINGS))]
    widths[2] = max(len(row[2]) for row in rows if len(row) == len(_HEADINGS))
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_reasons([status.address for status in found], views)])


def _row(status: NodeStatus, views: Views) -> tuple[str, ...]:
    out_at = f"{len(_out_at(status.address, views))}/{len(views)}" if views else "-"
    now = status.statistics
    if now is None:
        return (status.address, out_at, status.state)
    asked = now.hits_total + now.misses_total
    return (
        status.address,
        out_at,
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


def _reasons(asked: Sequence[str], views: Views) -> list[str]:
    """Why nodes are out, each reason once, with who says so; also of nodes that only clients know."""
    known = {address for out in views.values() for address in out}
    lines = []
    for address in [*asked, *sorted(known.difference(asked))]:
        clients: dict[str, list[str]] = {}
        for client, reason in _out_at(address, views).items():
            clients.setdefault(reason.removeprefix(f"memory node {address} "), []).append(client)
        for reason, names in sorted(clients.items(), key=lambda item: -len(item[1])):
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            lines.append(f"{address} is out at {', '.join(names[:_MAX_NAMES])}{more}: {reason}")
    return ["", *lines] if lines else []
