"""Several clients read from one memory node: what they get together, and how long a look-up takes meanwhile.

The clients are processes; each reads the same batch again and again, and another one asks what the pool has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

from polarkv_sglang.bench.nodes import LocalNode, local_node
from polarkv_sglang.bench.rank import Arena, a_rank
from polarkv_sglang.errors import PolarError

_BLOCK_BYTES = 1 << 20
_BLOCKS = 32  # in a batch of a client
_ASKED_BLOCKS = 128  # in a look-up: as many as an engine asks for at once
_PAUSE_S = 0.005  # between look-ups
_START_S = 60.0


class Row(NamedTuple):
    """With so many clients that read."""

    clients: int
    look_ups_s: list[float]  # in order
    gbps: float  # of all clients

    def look_up_ms(self, share: float) -> float:
        """That so many of the look-ups took at most."""
        return 1e3 * self.look_ups_s[min(int(share * len(self.look_ups_s)), len(self.look_ups_s) - 1)]


def measure(node: LocalNode, ucx_tls: str | None, clients: int, seconds: float) -> Row:
    """Look-ups for so long, beside so many clients. Raises NodeError."""
    with ExitStack() as stack:
        ends = [stack.enter_context(_reader(node, ucx_tls)) for _ in range(clients)]
        arena = Arena(_BLOCK_BYTES)
        with a_rank([node.address], arena, token=node.token, ucx_tls=ucx_tls) as rank:
            for end in ends:
                _told(end)
                end.send("begin")
            asked = arena.batches(1, _ASKED_BLOCKS, 1)[0].blocks
            look_ups: list[float] = []
            until = time.perf_counter() + seconds
            while (started := time.perf_counter()) < until:
                rank.client.peek(asked)
                look_ups.append(time.perf_counter() - started)
                time.sleep(_PAUSE_S)
        for end in ends:
            end.send("end")
        return Row(clients, sorted(look_ups), sum(_told(end) for end in ends))


@contextmanager
def _reader(node: LocalNode, ucx_tls: str | None) -> Iterator[Connection]:
    """A client in a process of its own, and the way to talk to it; it ends with the block."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_read, args=(theirs, node.address, node.token, ucx_tls), daemon=True)
    process.start()
    theirs.close()  # so that one which ends too early ends the wait for it
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _told(end: Connection) -> float:
    if not end.poll(_START_S):
        raise PolarError("a client does not answer")
    figure: float = end.recv()
    return figure


def _read(end: Connection, address: str, token: str, ucx_tls: str | None) -> None:
    """Tell when ready, read from "begin" to "end", and tell the rate in 10^9 bytes a second."""
    arena = Arena(_BLOCKS * _BLOCK_BYTES)
    with a_rank([address], arena, token=token, ucx_tls=ucx_tls) as rank:
        batches = arena.batches(_BLOCK_BYTES, _BLOCKS, 1)
        rank.put(batches)
        end.send(0.0)
        end.recv()
        started, moved_bytes = time.perf_counter(), 0
        while not end.poll():
            rank.get(batches)
            moved_bytes += batches[0].bytes
        end.send(moved_bytes / 1e9 / (time.perf_counter() - started))
        arena.verify(batches)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each number of clients."""
    lines = [
        "| clients | GB/s of all | look-up, ms | 99 % below, ms |",
        "| ------: | ----------: | ----------: | -------------: |",
    ]
    for row in rows:
        middle, most = 1e3 * median(row.look_ups_s), row.look_up_ms(0.99)
        lines.append(f"| {row.clients:7} | {row.gbps:11.2f} | {middle:11.2f} | {most:14.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description=__doc__)
    option = parser.add_argument
    option("--clients", default="0,1,3", help="that read at once; default: %(default)s")
    option("--seconds", type=float, default=5.0, help="of each row; default: %(default)s")
    option("--ucx-tls", default="tcp", help="of node and clients; default: %(default)s")
    args = parser.parse_args()
    try:
        counts = [int(text) for text in args.clients.split(",")]
        if min(counts) < 0 or not args.seconds > 0:
            raise ValueError("below 0")
    except ValueError as error:
        parser.error(f"--clients and --seconds are numbers: {error}")
    capacity = 4 * _BLOCKS * _BLOCK_BYTES * max(2, *counts)
    try:
        with local_node(capacity, ucx_tls=args.ucx_tls) as node:
            node.wait_settled()
            rows = [measure(node, args.ucx_tls, count, args.seconds) for count in counts]
    except PolarError as error:
        print(f"The measurement failed: {error}", file=sys.stderr)
        return 1
    print(f"{os.cpu_count()} cores; {_BLOCKS} x 1 MiB a read, {_ASKED_BLOCKS} keys a look-up, {args.ucx_tls}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
