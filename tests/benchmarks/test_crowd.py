"""A node that several clients read from, in small."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.crowd import Row, table


def test_row_has_the_median_and_what_nearly_all_took() -> None:
    row = Row(3, [number / 1000 for number in range(1, 101)], 2.5)
    assert table([row]).splitlines()[-1].split() == ["|", "3", "|", "2.50", "|", "50.50", "|", "100.00", "|"]


def test_clients_read_while_another_asks() -> None:
    command = [sys.executable, "-m", "benchmarks.crowd", "--clients", "1", "--seconds", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    clients, gbps, look_up_ms, most_ms = map(float, done.stdout.splitlines()[-1].strip("| ").split("|"))
    assert (clients, gbps > 0) == (1, True)
    assert 0 < look_up_ms <= most_ms


def test_numbers_that_are_none_are_named() -> None:
    command = [sys.executable, "-m", "benchmarks.crowd", "--clients", "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "'two'" in done.stderr
