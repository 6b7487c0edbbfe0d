"""The Triton kernels without a GPU: the tests of this folder once more, in Triton's interpreter.

In a process of its own, since the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.support import INTERPRETED

FOLDER = Path(__file__).parent
MODULES = ["pack", "rotate", "attention", "deviation", "checksum", "dispatch"]


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
def test_kernels_keep_their_promises_in_the_interpreter() -> None:
    files = [str(FOLDER / f"test_{module}.py") for module in MODULES]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *files]
    process = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed is not None, process.stdout
    assert int(passed[1]) > 50
