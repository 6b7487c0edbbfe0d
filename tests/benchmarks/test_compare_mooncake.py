"""What the comparison promises about its own fairness, without Mooncake."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bare_sockets import socket_store
from benchmarks.blocks import Blocks
from benchmarks.compare_mooncake import (
    BATCH_BYTES,
    LOCAL,
    MOONCAKE,
    SOCKETS,
    TCP,
    Case,
    Figures,
    Traffic,
    cases,
    fresh_keys,
    measure,
    table,
)
from benchmarks.stores import ComparisonFailed, polar_store

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def blocks() -> Blocks:
    return Blocks(4 * MIB)


def test_no_batch_is_larger_than_the_limit_and_none_is_measured_twice() -> None:
    chosen = cases([64 * KIB, 16 * MIB, 64 * MIB], [1, 16, 64, 256])
    assert [case.batch_blocks for case in chosen] == [1, 16, 64, 256, 1, 16, 32, 1, 8]
    assert max(case.total_bytes for case in chosen) == BATCH_BYTES


def test_blocks_arrived_only_if_every_byte_did(blocks: Blocks) -> None:
    blocks.renew(2, MIB)
    assert not blocks.arrived(2, MIB)
    target = blocks.address + blocks.half_bytes
    ctypes.memmove(target, blocks.address, 2 * MIB)
    assert blocks.arrived(2, MIB)
    ctypes.memset(target + MIB + 17, 0xFF ^ ctypes.string_at(target + MIB + 17, 1)[0], 1)
    assert not blocks.arrived(2, MIB)


def test_renewed_blocks_differ_from_all_before(blocks: Blocks) -> None:
    blocks.renew(4, MIB)
    ctypes.memmove(blocks.address + blocks.half_bytes, blocks.address, 4 * MIB)
    kept = [ctypes.string_at(blocks.address + number * MIB, MIB) for number in range(4)]
    blocks.renew(4, MIB)
    assert not blocks.arrived(4, MIB)
    renewed = [ctypes.string_at(blocks.address + number * MIB, MIB) for number in range(4)]
    assert len({*kept, *renewed}) == 8


def test_all_stores_are_measured_and_tcp_is_seen_on_the_loopback_interface(
    blocks: Blocks, tmp_path: Path
) -> None:
    with (
        # One more of our own in the place of Mooncake, which is not installed here.
        polar_store(MOONCAKE, blocks, 128 * MIB, "tcp", tmp_path / "mooncake.log") as mooncake,
        polar_store(TCP, blocks, 128 * MIB, "tcp", tmp_path / "tcp.log") as tcp,
        polar_store(LOCAL, blocks, 128 * MIB, None, tmp_path / "local.log") as local,
        # Comes round in the third batch.
        socket_store(SOCKETS, blocks, 10 * MIB) as sockets,
    ):
        stores = [mooncake, tcp, local, sockets]
        traffic = {store.name: Traffic() for store in stores}
        figures = measure(Case(256 * KIB, 16), stores, blocks, 2, traffic)
    assert [row.op for row in figures] == ["put", "get"]
    assert all(row.tcp_gbps > 0 and row.local_gbps > 0 and row.socket_gbps > 0 for row in figures)
    for name in (TCP, SOCKETS):
        assert traffic[name].moved_bytes == 3 * 2 * 4 * MIB
        assert traffic[name].share >= 1


def test_blocks_that_a_store_lost_fail_the_comparison(blocks: Blocks, tmp_path: Path) -> None:
    with (
        polar_store(TCP, blocks, 128 * MIB, "tcp", tmp_path / "tcp.log") as store,
        pytest.raises(ComparisonFailed, match="get of 2 x 4096 B did 0 blocks"),
    ):
        store.get(fresh_keys(2), 4 * KIB)


def test_table_has_puts_before_gets_and_a_ratio_for_each() -> None:
    figures = [
        Figures(
            op=op,
            block_bytes=MIB,
            batch_blocks=16,
            repeats=7,
            mooncake_gbps=2.0,
            tcp_gbps=5.0,
            tcp_ratio=2.5,
            local_gbps=11.0,
            local_ratio=5.5,
            socket_gbps=6.0,
            socket_ratio=3.0,
        )
        for op in ("get", "put")
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(figures).splitlines()]
    assert rows[2] == ["put", "1 MiB", "16", "2.00", "5.00", "2.50", "11.00", "5.50", "6.00", "3.00"]
    assert rows[3] == ["get", "1 MiB", "16", "2.00", "5.00", "2.50", "11.00", "5.50", "6.00", "3.00"]


def test_an_interpreter_without_mooncake_is_told_how_to_get_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare_mooncake", "--mooncake-python", sys.executable],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "No module named 'mooncake'" in done.stderr
    assert "pip install mooncake-transfer-engine-non-cuda" in done.stderr
