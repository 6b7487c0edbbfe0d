"""``polarkv node``: run a memory node."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polarkv_sglang.config import format_bytes, parse_address, parse_bytes
from polarkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    from polarkv_sglang.pool.node import NodeSettings

DEFAULT_PORT = 7411


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser("node", help="lend this host's memory to the pool")
    parser.add_argument(
        "--listen",
        default=f"127.0.0.1:{DEFAULT_PORT}",
        metavar="HOST:PORT",
        help="Where clients find the control server; port 0 takes a free one. Default: %(default)s.",
    )
    parser.add_argument("--capacity", required=True, metavar="SIZE", help="Memory to lend, such as 8GiB.")
    parser.add_argument(
        "--segment", metavar="SIZE", help="Longest block. Default: a sixteenth of the capacity, 2 to 64 MiB."
    )
    parser.add_argument(
        "--prefault",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Take all of the memory at the start, in the background. Default: --prefault.",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="Serve Prometheus metrics; 0 takes a free port. Default: off.",
    )
    parser.add_argument(
        "--ucx-tls",
        metavar="LIST",
        help="UCX transports, as UCX_TLS; tcp must be among them (or POLARKV_UCX_TLS).",
    )
    parser.add_argument(
        "--ucx-library",
        metavar="PATH",
        help="libucp.so.0 (or POLARKV_UCX_LIBRARY). Default: the system's (>= 1.17), else the wheel's.",
    )
    parser.add_argument(
        "--embedded", type=Path, help=argparse.SUPPRESS
    )  # runtime folder; see pool/embedded.py
    return parser


def run(args: argparse.Namespace) -> int:
    host, port = _parse_listen(args.listen)
    capacity_bytes = parse_bytes(args.capacity)
    segment_bytes = parse_bytes(args.segment) if args.segment is not None else None
    if args.embedded is not None:
        _detach()
    # Imported after the fork of _detach, which threads of numpy or UCX would not survive.
    from polarkv_sglang.pool.node import NodeSettings

    _allow_descriptors()
    tls, client_tls = _tls(args)
    settings = NodeSettings(
        host=host,
        port=port,
        capacity_bytes=capacity_bytes,
        segment_bytes=segment_bytes,
        token=args.token,
        tls=tls,
        client_tls=client_tls,
        prefault=args.prefault and args.embedded is None,
        ucx_tls=args.ucx_tls,
        ucx_library=args.ucx_library,
        embedded=args.embedded is not None,
    )
    import uvloop  # half the time of asyncio's own loop for a request

    uvloop.run(_serve(settings, args.metrics_port, args.embedded))
    return 0


async def _serve(settings: NodeSettings, metrics_port: int | None, runtime_dir: Path | None) -> None:
    from polarkv_sglang.pool.embedded import published
    from polarkv_sglang.pool.metrics import serving_metrics
    from polarkv_sglang.pool.node import memory_node

    loop = asyncio.get_running_loop()
    async with memory_node(settings) as node:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.stop)
        line = (
            f"polarkv node {node.node_id.hex()[:12]} listening on {node.address}, "
            f"capacity {format_bytes(node.capacity_bytes)}, libucp {node.libucp}, "
            f"pages: {node.pages}{', TLS' if settings.tls is not None else ''}"
        )
        with ExitStack() as stack:
            if metrics_port is not None:
                port = stack.enter_context(
                    serving_metrics(node.statistics_from_thread, settings.host, metrics_port)
                )
                line += f", metrics on http://{settings.host}:{port}/metrics"
            if runtime_dir is not None:
                stack.enter_context(published(runtime_dir, node.address, settings.token))
            print(line, flush=True)
            await node.stopped()


def _tls(args: argparse.Namespace) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """Contexts to serve with, and to reach other nodes with."""
    if args.embedded is not None:
        return (
            None,
            None,
        )  # the variables are meant for the pool; an embedded node is reached on loopback only
    from polarkv_sglang.transport.tls import TlsFiles, client_context, server_context

    files = TlsFiles.of(args.tls_cert, args.tls_key, args.tls_ca)
    return (server_context(*files), client_context(*files)) if files is not None else (None, None)


def _parse_listen(text: str) -> tuple[str, int]:
    if text.endswith(":0"):
        return parse_address(text + "1")[0], 0
    try:
        return parse_address(text)
    except ConfigError as error:
        raise ConfigError(
            f"--listen {text!r} is not HOST:PORT; write for example 127.0.0.1:{DEFAULT_PORT}"
        ) from error


def _allow_descriptors() -> None:
    """As many as the system lets us have: a rank takes up to nine, and shells allow a thousand."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # then it is what it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _detach() -> None:
    """Go on in a process that no engine is a parent of: SGLang ends its children when it ends."""
    if os.fork():
        os._exit(0)
