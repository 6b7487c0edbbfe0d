"""Blended passes on real models, in a process of their own: SGLang keeps a model's settings in globals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.timeout(320)
@pytest.mark.parametrize(
    ("mark", "tests"), [("not slow", 60), pytest.param("slow", 10, marks=pytest.mark.slow)], ids=str
)
def test_passes_keep_their_promises(mark: str, tests: int) -> None:
    files = [str(FOLDER / name) for name in ("scheduling.py", "losing.py", "refusing.py", "passes.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, *files]
    # So small operations cost more in threads that wait for each other than they take.
    process = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None, process.stdout
    assert int(passed[1]) > tests
