"""A short soak, in the order of events that the long one has."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["hicache", "direct"])
def test_a_short_soak_finds_nothing_wrong(mode: str) -> None:
    command = [sys.executable, "-m", "tests.faults.soak", "--mode", mode, "--requests", "200", "--seed", "1"]
    # A group of its own: an interrupt makes all of it end what it has started.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            assert process.wait(360) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
