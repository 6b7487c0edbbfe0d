"""The bench measures the real pool; here only that it does, and says what it could not, never how fast."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.commands import COMMAND, absent_address, environment, polarkv, polarkv_each, ucx_without_tools
from tests.support import running_node

SMALL = ("--json", "--repeats", "1", "--memory", "64MiB")
FIGURES = ("gbps", "memcpy_gbps", "ucx_gbps", "ucx_put_gbps", "busy_gbps")


def rows(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def has_figure(row: dict[str, object], name: str) -> bool:
    low, median, high = (row[name + suffix] for suffix in ("_min", "", "_max"))
    if median is None:
        return False
    assert isinstance(low, float)
    assert isinstance(median, float)
    assert isinstance(high, float)
    assert 0 < low <= median <= high
    return True


def test_every_size_and_batch_is_a_line_for_put_and_get_with_all_figures() -> None:
    done = polarkv("bench", *SMALL, "--transport", "tcp", "--sizes", "256KiB,64MiB", "--batches", "1,8")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [(row["transport"], row["op"], row["block_bytes"], row["batch_blocks"]) for row in found] == [
        ("tcp", op, 256 << 10, blocks) for blocks in (1, 8) for op in ("put", "get")
    ]
    assert all(has_figure(row, name) for row in found for name in FIGURES)
    # What does not fit into the memory that may be used is not measured, and that is said.
    assert "skipped 1 x 64.0 MiB" in done.stderr
    assert "skipped 8 x 64.0 MiB" in done.stderr


def test_without_ucx_perftest_the_column_is_empty_and_the_reason_is_told(tmp_path: Path) -> None:
    library = ("--ucx-library", ucx_without_tools(tmp_path))
    sizes = ("--transport", "shm", "--sizes", "64KiB", "--batches", "4", "--repeats", "3")
    done = polarkv("bench", *SMALL, *sizes, *library, env={"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    put, get = rows(done.stdout)
    assert all(has_figure(row, name) for row in (put, get) for name in ("gbps", "memcpy_gbps", "busy_gbps"))
    assert (put["ucx_gbps"], get["ucx_gbps"]) == (None, None)
    assert "no figures of raw UCX: there is no ucx_perftest" in done.stderr


def test_nodes_of_a_pool_are_measured_and_one_that_is_down_is_told() -> None:
    down = absent_address()
    flags = (*SMALL, "--sizes", "64KiB", "--batches", "4")
    with running_node(token="secret") as first, running_node(token="secret") as second:
        nodes = f"{first.address},{second.address}"
        done = polarkv("bench", *flags, "--nodes", nodes, env={"POLARKV_TOKEN": "secret"})
        assert done.returncode == 0, done.stderr
        found = rows(done.stdout)
        assert all(has_figure(row, "gbps") for row in found)
        assert [row["ucx_put_gbps"] for row in found] == [None, None], (
            "it would overwrite what others have there"
        )
        assert first.statistics().commits_total + second.statistics().commits_total > 0
    done = polarkv("bench", *flags, "--nodes", down)
    assert done.returncode == 1
    assert [row["gbps"] for row in rows(done.stdout)] == [None, None]
    assert "Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_index_tells_keys_a_second_and_bytes_a_block() -> None:
    done = polarkv("bench", "--index", "--blocks", "20000", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    [row] = rows(done.stdout)
    assert row["blocks"] == 20096  # whole prompts
    assert 0 < row["bytes_per_block"] < 10_000
    assert has_figure(row, "keys_per_s")
    assert has_figure(row, "pipelined_keys_per_s")


def test_spread_has_a_line_for_each_number_of_nodes() -> None:
    flags = ("--repeats", "1", "--memory", "64MiB", "--transport", "shm", "--json")
    done = polarkv("bench", "--spread", "3", *flags)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [row["nodes"] for row in found] == [1, 2, 3]
    assert all(has_figure(row, name) for row in found for name in ("get_latency_ms", "gbps"))


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_bench_leaves_no_process_behind(number: int) -> None:
    command = [*COMMAND, "bench", "--transport", "shm", "--sizes", "64KiB", "--memory", "64MiB"]
    with subprocess.Popen(
        [*command, "--repeats", "1000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever started us in the background of a shell may have had it ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        bench = psutil.Process(process.pid)
        deadline = time.monotonic() + 30
        while not (nodes := [child for child in bench.children() if "node" in command_line(child)]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in output + errors
    gone, alive = psutil.wait_procs(nodes, timeout=5)
    assert (len(gone), alive) == (len(nodes), [])


WRONG_FLAGS = [
    (("--sizes", "big"), "size 'big' is not understood"),
    (("--sizes", "0"), "--sizes has a block of 0 bytes"),
    (("--batches", "0"), "--batches '0' is not a number of blocks from 1 to 8192"),
    (("--transport", "pigeon"), "--transport 'pigeon' is unknown; known are all, shm, cma, tcp, rdma"),
    (("--transport", "rdma"), "--transport rdma: UCX offers "),
    (("--memory", "1MiB"), "--memory 1MiB is below 64 MiB"),
    (("--repeats", "0"), "--repeats 0 is below 1"),
    (("--index", "--nodes", "10.0.0.4:7411"), "leave --nodes out"),
    (("--nodes", "nowhere"), "pool node 'nowhere' is not host:port"),
    (("--plot", "layers.png"), "write polarkv bench direct"),
]


def test_wrong_flag_is_one_line_that_names_it() -> None:
    each = polarkv_each([("bench", *flags) for flags, _ in WRONG_FLAGS])
    for done, (flags, complaint) in zip(each, WRONG_FLAGS, strict=True):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), flags
        assert complaint in done.stderr


@pytest.mark.slow
def test_direct_tells_when_each_layer_arrived_and_when_it_was_needed(tmp_path: Path) -> None:
    picture = tmp_path / "layers.png"
    flags = ("--json", "--repeats", "2", "--pages", "2", "--transport", "shm", "--plot", str(picture))
    done = polarkv("bench", "direct", *flags)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = rows(done.stdout)
    assert len(found) == 2
    for row in found:
        assert row["layers"] == len(row["arrived_s"]) == len(row["needed_s"]) == 32  # type: ignore[arg-type]
        assert row["arrived_s"] == sorted(row["arrived_s"])  # type: ignore[type-var, arg-type]
        assert row["needed_s"] == sorted(row["needed_s"])  # type: ignore[type-var, arg-type]
        assert row["ttft_s"] >= max(row["arrived_s"])  # type: ignore[operator, type-var]
        slower = max(row["transfer_s"], row["compute_s"])  # type: ignore[type-var]
        assert row["overlap_efficiency"] == pytest.approx(row["ttft_s"] / slower)  # type: ignore[operator]


def test_direct_takes_no_nodes() -> None:
    done = polarkv("bench", "direct", "--nodes", "127.0.0.1:7411")
    assert done.returncode != 0
    assert "leave out --nodes" in done.stderr
