"""PolarKV's pool beside a Mooncake store: puts and gets by block size and batch, in one run.

Each figure is a median over repeats; in every repeat all stores move as much, in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import msgspec

from benchmarks.bare_sockets import socket_store
from benchmarks.blocks import Blocks
from benchmarks.stores import ComparisonFailed, Store, mooncake_store, polar_store
from examples.common.processes import unwind_on_signals
from polarkv_sglang.config import format_bytes, parse_bytes
from polarkv_sglang.errors import ConfigError, PolarError
from polarkv_sglang.identity import KEY_BYTES

SIZES = "64KiB,256KiB,1MiB,4MiB,16MiB,64MiB"
BATCHES = "1,16,64,256"
BATCH_BYTES = 512 << 20  # of a batch at most: larger ones are cut to as many blocks as fit
MAX_BLOCK_BYTES = 64 << 20
CAPACITY_BYTES = 1 << 30  # of each store
REPEATS = 7
SHORT_BYTES = 32 << 20  # batches of at most so many bytes are repeated SHORT_FACTOR times as often
SHORT_FACTOR = 3
MOONCAKE, TCP, LOCAL = "Mooncake", "PolarKV over TCP", "PolarKV, same host"
SOCKETS = "bare sockets"  # what a store over TCP is bounded by that has the socket copy its bytes
SETUP = """\
To set Mooncake up on Debian or Ubuntu, in a virtual environment of its own:

  apt-get install libibverbs1 librdmacm1 libnuma1
  python3.11 -m venv mooncake-venv
  mooncake-venv/bin/pip install mooncake-transfer-engine-non-cuda
  python -m benchmarks.compare_mooncake --mooncake-python mooncake-venv/bin/python
"""

Operation = Literal["put", "get"]
OPERATIONS: tuple[Operation, ...] = ("put", "get")


class Case(NamedTuple):
    """So many blocks of one size in one call."""

    block_bytes: int
    batch_blocks: int

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.batch_blocks


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one operation of one case in 10^9 bytes a second, and those over Mooncake's."""

    op: Operation
    block_bytes: int
    batch_blocks: int
    repeats: int
    mooncake_gbps: float
    tcp_gbps: float  # PolarKV over TCP
    tcp_ratio: float
    local_gbps: float  # PolarKV as it is by default on one host
    local_ratio: float
    socket_gbps: float  # bytes through a connection, without a store
    socket_ratio: float


class Traffic:
    """Payload that a store moved, and what passed the loopback interface meanwhile: whether it was TCP."""

    def __init__(self) -> None:
        self.moved_bytes = 0
        self.loopback_bytes = 0

    @contextmanager
    def counting(self, moved_bytes: int) -> Iterator[None]:
        """Count a transfer; what other programs send meanwhile is counted with it."""
        before = _loopback_bytes()
        yield
        self.loopback_bytes += _loopback_bytes() - before
        self.moved_bytes += moved_bytes

    @property
    def share(self) -> float:
        """Bytes on the loopback interface for each byte of payload."""
        return self.loopback_bytes / self.moved_bytes


def cases(sizes: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Every size with every batch, cut to BATCH_BYTES; each once."""
    return [
        Case(size, count)
        for size in sizes
        for count in sorted({min(batch, BATCH_BYTES // size) for batch in batches})
    ]


def fill(stores: Sequence[Store], blocks: Blocks) -> None:
    """Have the memory that stores will use touched: the first touch of a page takes several times longer."""
    count = BATCH_BYTES // MAX_BLOCK_BYTES
    for store in stores:
        for _ in range(CAPACITY_BYTES // BATCH_BYTES + 1):
            keys = fresh_keys(count)
            blocks.renew(count, MAX_BLOCK_BYTES)
            store.put(keys, MAX_BLOCK_BYTES)
            store.discard(keys)


def measure(
    case: Case, stores: Sequence[Store], blocks: Blocks, repeats: int, traffic: Mapping[str, Traffic]
) -> list[Figures]:
    """Put fresh blocks into each store and get them back, ``repeats`` times and once before that counts.

    Raises ComparisonFailed if a store fails, or gives back other bytes than were put.
    """
    seconds: defaultdict[tuple[Operation, str], list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        turn = repeat % len(stores)
        for store in (*stores[turn:], *stores[:turn]):
            keys = fresh_keys(case.batch_blocks)
            blocks.renew(case.batch_blocks, case.block_bytes)
            with traffic[store.name].counting(2 * case.total_bytes):
                put_s = store.put(keys, case.block_bytes)
                get_s = store.get(keys, case.block_bytes)
            if not blocks.arrived(case.batch_blocks, case.block_bytes):
                raise ComparisonFailed(f"{store.name} gave back other bytes than were put ({case})")
            store.discard(keys)
            if repeat:
                seconds["put", store.name].append(put_s)
                seconds["get", store.name].append(get_s)
    return [_figures(op, case, repeats, seconds) for op in OPERATIONS]


def _figures(
    op: Operation, case: Case, repeats: int, seconds: Mapping[tuple[Operation, str], Sequence[float]]
) -> Figures:
    mooncake, tcp, local, sockets = (
        case.total_bytes / 1e9 / median(seconds[op, name]) for name in (MOONCAKE, TCP, LOCAL, SOCKETS)
    )
    return Figures(
        op=op,
        block_bytes=case.block_bytes,
        batch_blocks=case.batch_blocks,
        repeats=repeats,
        mooncake_gbps=mooncake,
        tcp_gbps=tcp,
        tcp_ratio=tcp / mooncake,
        local_gbps=local,
        local_ratio=local / mooncake,
        socket_gbps=sockets,
        socket_ratio=sockets / mooncake,
    )


def fresh_keys(count: int) -> list[bytes]:
    """Keys that no store has seen."""
    return [os.urandom(KEY_BYTES) for _ in range(count)]


def table(figures: Sequence[Figures]) -> str:
    """Markdown, a line per figure, puts before gets; rates in GB/s (10^9)."""
    header = ["op", "block", "blocks", MOONCAKE, TCP, "ratio", LOCAL, "ratio", SOCKETS, "ratio"]
    rows = [
        [
            row.op, format_bytes(row.block_bytes).replace(".0", ""), str(row.batch_blocks),
            f"{row.mooncake_gbps:.2f}", f"{row.tcp_gbps:.2f}", f"{row.tcp_ratio:.2f}",
            f"{row.local_gbps:.2f}", f"{row.local_ratio:.2f}",
            f"{row.socket_gbps:.2f}", f"{row.socket_ratio:.2f}",
        ]
        for op in OPERATIONS
        for row in figures
        if row.op == op
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(map(str.rjust, cells, widths))} |" for cells in (header, rule, *rows))


def summary(figures: Sequence[Figures], traffic: Mapping[str, Traffic]) -> str:
    """The range of the ratios, and what passed the loopback interface."""
    lines = []
    for op in OPERATIONS:
        tcp = sorted(row.tcp_ratio for row in figures if row.op == op)
        lines.append(
            f"{op}: {TCP} {tcp[0]:.2f} to {tcp[-1]:.2f} times Mooncake's rate, median {median(tcp):.2f}"
        )
    shares = ", ".join(f"{name} {counted.share:.2f}" for name, counted in traffic.items())
    return "\n".join([*lines, f"bytes on the loopback interface for each byte moved: {shares}"])


def run(
    python: Path, chosen: Sequence[Case], repeats: int, logs: Path
) -> tuple[list[Figures], dict[str, Traffic]]:
    """Measure all cases; every process has ended when this returns or raises."""
    blocks = Blocks(BATCH_BYTES)
    with ExitStack() as stack:
        start = stack.enter_context
        stores: list[Store] = [
            start(mooncake_store(MOONCAKE, python, blocks, CAPACITY_BYTES, logs)),
            start(polar_store(TCP, blocks, CAPACITY_BYTES, "tcp", logs / "polarkv_tcp.log")),
            start(polar_store(LOCAL, blocks, CAPACITY_BYTES, None, logs / "polarkv_local.log")),
            start(socket_store(SOCKETS, blocks, CAPACITY_BYTES)),
        ]
        for store in stores:
            _say(f"{store.name}: {store.version}")
        fill(stores, blocks)
        traffic = {store.name: Traffic() for store in stores}
        figures: list[Figures] = []
        for case in chosen:
            _say(f"{case.batch_blocks} x {format_bytes(case.block_bytes)}")
            factor = SHORT_FACTOR if case.total_bytes <= SHORT_BYTES else 1
            figures += measure(case, stores, blocks, factor * repeats, traffic)
    for name in (MOONCAKE, TCP):
        if traffic[name].share < 1:
            raise ComparisonFailed(f"{name} did not move its blocks over TCP on the loopback interface")
    return figures, traffic


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_mooncake",
        description=__doc__,
        epilog=SETUP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--mooncake-python", type=Path, required=True, help="Python interpreter that has Mooncake")
    option("--sizes", default=SIZES, help="of a block, 8 bytes to 64 MiB; default: %(default)s")
    option("--batches", default=BATCHES, help="blocks in a call; default: %(default)s")
    option("--repeats", type=int, default=REPEATS, help="of each case; small ones more; default: %(default)s")
    option("--json", type=Path, help="file for the figures, one object a line")
    option("--logs", type=Path, default=Path("build/compare_mooncake"), help="folder for the servers' logs")
    args = parser.parse_args()
    try:
        chosen = cases([*map(parse_bytes, args.sizes.split(","))], [*map(int, args.batches.split(","))])
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    if args.repeats < 1 or not all(_is_measurable(case) for case in chosen):
        parser.error("sizes are multiples of 8 bytes up to 64 MiB, batches and repeats are at least 1")
    python: Path = args.mooncake_python
    probe = subprocess.run(
        [python, "-c", "import mooncake.store"], capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
        print(f"{python} has no usable Mooncake: {reason}\n\n{SETUP}", file=sys.stderr)
        return 2
    unwind_on_signals()
    args.logs.mkdir(parents=True, exist_ok=True)
    for log in args.logs.glob("*.log"):
        log.unlink()
    started = time.monotonic()
    try:
        figures, traffic = run(python, chosen, args.repeats, args.logs)
    except PolarError as error:
        print(f"The comparison failed: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in figures))
    print(f"\n{table(figures)}\n\n{summary(figures, traffic)}")
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
    _say(f"\n{machine}, Python {platform.python_version()}; {time.monotonic() - started:.0f} s")
    return 0


def _is_measurable(case: Case) -> bool:
    return case.batch_blocks > 0 and 0 < case.block_bytes <= MAX_BLOCK_BYTES and case.block_bytes % 8 == 0


def _loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text(encoding="ascii"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
