"""Memory nodes behind links of limited rate: what several deliver together, and when a get is answered.

Every node is in a network namespace of its own, as if it were a host, and its link to the client's namespace
passes no more than ``--mbit`` each way. Needs Linux and root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.networks import Link, Network, network, why_not
from examples.common.processes import Process
from polarkv_sglang.bench.rank import STRIPE_PAGES, Arena, a_rank
from polarkv_sglang.bench.spread import node_counts

_BLOCK_BYTES = 64 << 10
_BLOCKS = 64 * STRIPE_PAGES  # stripes enough that placement is nearly even
_GET_BLOCKS = 128  # of a get whose latency is measured: as many as an engine asks for at once
_GETS = 5
_CAPACITY = "256MiB"
_PORT = 7411
_TOKEN = "limited links"


def limit(network: Network, mbit: int) -> None:
    """Let every link pass so many 10^6 bits a second each way, and no more."""
    for link in network.links:
        for side in (link.hub, link.host):
            shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms"]
            subprocess.run(["tc", "-n", side.name, "qdisc", "add", "dev", link.device, *shape], check=True)


@contextmanager
def node(link: Link, log: Path) -> Iterator[str]:
    """A memory node at the far end of a link; its address."""
    address = f"{link.address}:{_PORT}"
    command = [*link.host.launcher, sys.executable, "-m", "polarkv_sglang.cli", "node", "--listen", address]
    command += ["--capacity", _CAPACITY, "--ucx-tls", "tcp"]
    process = Process(f"node at {address}", command, lambda: _answers(link), log)
    process.start()
    try:
        process.wait_until_ready()
        yield address
    finally:
        process.stop()


def _answers(link: Link) -> bool:
    probe = f"import socket; socket.create_connection(('{link.address}', {_PORT}), 1)"
    command = [*link.hub.launcher, sys.executable, "-S", "-c", probe]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def measure(nodes: Sequence[str], repeats: int) -> None:
    """Print one JSON line for each number of nodes. Runs in the client's namespace."""
    arena = Arena(_BLOCKS * _BLOCK_BYTES)
    for count in node_counts(len(nodes)):
        with a_rank(nodes[:count], arena, token=_TOKEN, ucx_tls="tcp") as rank:
            rank.wait_live()
            gbps: dict[str, list[float]] = {"put": [], "get": []}
            latencies: list[float] = []
            for _ in range(repeats):
                batches = arena.batches(_BLOCK_BYTES, _BLOCKS, 1)
                arena.wipe(batches)
                gbps["put"].append(batches[0].bytes / sum(rank.put(batches)) / 1e9)
                gbps["get"].append(batches[0].bytes / sum(rank.get(batches)) / 1e9)
                arena.verify(batches)
                batches = arena.batches(_BLOCK_BYTES, _GET_BLOCKS, _GETS)
                arena.wipe(batches)
                rank.put(batches)
                latencies += rank.get(batches)
                arena.verify(batches)
        row = {"nodes": count, "put": median(gbps["put"]), "get": median(gbps["get"])}
        print(json.dumps(row | {"get_ms": 1e3 * median(latencies)}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limited_links", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, help="most nodes; default: %(default)s")
    parser.add_argument("--mbit", type=int, default=1000, help="of a link, each way; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--logs", type=Path, default=Path("build/limited_links"), help="default: %(default)s")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        measure(args.client.split(","), args.repeats)
        return 0
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    args.logs.mkdir(parents=True, exist_ok=True)
    os.environ["POLARKV_TOKEN"] = _TOKEN
    with ExitStack() as stack:
        hosts = stack.enter_context(network(*[1] * args.nodes))
        limit(hosts, args.mbit)
        nodes = [
            stack.enter_context(node(link, args.logs / f"node{number}.log"))
            for number, link in enumerate(hosts.links)
        ]
        client = [*hosts.hub.launcher, sys.executable, "-m", "benchmarks.limited_links"]
        client += ["--client", ",".join(nodes), "--repeats", str(args.repeats)]
        done = subprocess.run(client, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return 1
    link, block = f"{args.mbit / 8000:.3f} GB/s", f"{_BLOCK_BYTES >> 10} KiB"
    print(f"links of {link} each way; {_BLOCKS} x {block}, and one get of {_GET_BLOCKS} x {block}")
    print("| nodes | put GB/s | get GB/s | get ms |\n| ----: | -------: | -------: | -----: |")
    for line in done.stdout.splitlines():
        row = json.loads(line)
        print(f"| {row['nodes']:5} | {row['put']:8.2f} | {row['get']:8.2f} | {row['get_ms']:6.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
