"""Where the tests of this folder compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.kernels.support import INTERPRETED

FOLDER = Path(__file__).parent
MODULES = ["pack", "rotate", "attention", "deviation", "checksum", "dispatch"]


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available(),
                    reason="no GPU that Triton could compile for",
                ),
            ],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, which with TRITON_INTERPRET=1 means Triton's interpreter (see below); and a GPU."""
    return torch.device(request.param)


class Interpreter(NamedTuple):
    process: subprocess.Popen[bytes]
    output: Path


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """The tests of this folder in Triton's interpreter, under way.

    In a process of its own, since the interpreter is chosen when Triton is imported.
    """
    files = [str(FOLDER / f"test_{module}.py") for module in MODULES]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *files]
    output = tmp_path_factory.mktemp("interpreter") / "output"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with (
        output.open("wb") as file,
        subprocess.Popen(
            command, cwd=FOLDER.parents[1], env=environment, stdout=file, stderr=file
        ) as process,
    ):
        try:
            yield Interpreter(process, output)
        finally:
            process.kill()
