"""The Triton kernels compiled for GPUs that are not here: what the code does can be read off it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.conftest import Interpreter
from tests.kernels.support import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = 99 * 1024  # what every GPU since compute capability 8.0 gives a program


@pytest.fixture(scope="module", params=[pytest.param(80, marks=pytest.mark.slow), 90])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter
) -> list[dict[str, Any]]:
    """Every kernel for a compute capability; see compile_kernels.py. The interpreter runs beside it."""
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(request.param)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert process.returncode == 0, process.stderr
    kernels: list[dict[str, Any]] = json.loads(process.stdout)
    return kernels


def test_kernels_compile_and_access_memory_in_16_bytes(compiled: list[dict[str, Any]]) -> None:
    wide = {
        "_move": {"ld.global.v2.b64", "st.global.v2.b64"},
        "_rotate": {"ld.global.v4.b32", "st.global.v4.b32"},
        "_attend": {"ld.global.v4.b32", "st.global.v4.b32"},
        "_deviate": {"ld.global.v4.b32"},
        "_digest_whole": {"ld.global.v2.b64"},
        "_digest_any": set(),
    }
    assert {kernel["kernel"] for kernel in compiled} == set(wide)
    launches = Counter(kernel["kernel"] for kernel in compiled)
    assert launches["_move"] == 6, "K and V, latent KV and KV with gaps, each way: one launch for both blocks"
    for kernel in compiled:
        assert kernel["machine_code_bytes"] > 0
        assert wide[kernel["kernel"]] <= set(kernel["accesses"])
        if kernel["kernel"] == "_move":
            # Beside the 16-byte accesses only the page's first slot and the layer's address are read.
            assert kernel["accesses"].keys() == wide["_move"] | {"ld.global.b64"}
            assert kernel["accesses"]["ld.global.b64"] == 2


def test_a_program_fits_every_gpus_shared_memory(compiled: list[dict[str, Any]]) -> None:
    assert max(kernel["shared_bytes"] for kernel in compiled) <= SHARED_BYTES


def test_attention_uses_tensor_cores_and_rotation_exact_angles(compiled: list[dict[str, Any]]) -> None:
    attention = [kernel["tensor_cores"] for kernel in compiled if kernel["kernel"] == "_attend"]
    assert attention == [True, True, True, False]  # the last one is fp32
    assert not any(kernel["approximate"] for kernel in compiled if kernel["kernel"] == "_rotate")
