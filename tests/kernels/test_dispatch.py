"""Which implementation computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polarkv_sglang.kernels.checksum import checksum_blocks
from polarkv_sglang.kernels.dispatch import uses_triton
from tests.kernels.support import INTERPRETED

ALL_ON_A_CPU = """
import sys
import torch
from polarkv_sglang.kernels.attention import SparseQueries, sparse_query_attention
from polarkv_sglang.kernels.checksum import checksum_blocks
from polarkv_sglang.kernels.deviation import Rows, kv_deviation
from polarkv_sglang.kernels.layout import PagedPool
from polarkv_sglang.kernels.pack import pack_blocks, unpack_blocks
from polarkv_sglang.kernels.rotate import Moves, Rotary, rotate_keys

one = torch.zeros(1, dtype=torch.int64)
keys = torch.ones(4, 1, 16)
pool = PagedPool.of([[keys], [keys]], page_size=4)
blocks = torch.zeros(1, pool.block_bytes, dtype=torch.uint8)
pack_blocks(pool, one, blocks)
unpack_blocks(pool, one, blocks)
rotate_keys(keys, keys, Moves(one, one, one, one + 1), Rotary(torch.ones(8)))
sparse_query_attention(keys[:1], keys, keys, SparseQueries(one, torch.tensor([0, 1]), one, one[None], 1), 1.0)
kv_deviation([Rows(keys[:1], keys)], one)
checksum_blocks(blocks)
print("triton" in sys.modules)
"""


def test_triton_runs_on_a_gpu_and_in_its_interpreter_only(device: torch.device) -> None:
    assert uses_triton(torch.empty(0, device=device)) == (device.type == "cuda" or INTERPRETED)
    checksum_blocks(torch.ones(1, 1, dtype=torch.uint8, device=device))
    loaded = "polarkv_sglang.kernels.gpu.checksum" in sys.modules
    assert loaded or not (device.type == "cuda" or INTERPRETED)


@pytest.mark.skipif(INTERPRETED, reason="about a process without the interpreter")
def test_a_cpu_needs_no_triton() -> None:
    process = subprocess.run(
        [sys.executable, "-c", ALL_ON_A_CPU],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout.strip()) == (0, "False"), process.stderr
