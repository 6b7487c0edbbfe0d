"""Compiles every kernel for a GPU that is not here, and prints what came out as JSON.

    python -m tests.kernels.compile_kernels 90

The launchers run as on a GPU, at shapes of real models; what they launch is compiled down to machine code for
the compute capability, and not run.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from polarkv_sglang.kernels.attention import SparseQueries
from polarkv_sglang.kernels.deviation import Rows
from polarkv_sglang.kernels.gpu import attention, checksum, deviation, pack, rotate
from polarkv_sglang.kernels.layout import PagedPool
from polarkv_sglang.kernels.rotate import Moves, Rotary

ACCESS = re.compile(r"\b((?:ld|st)\.global[\w.:]*)")


class AbsentGpu:
    """What Triton's launch asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


DTYPE = torch.bfloat16
TOKENS = torch.arange(100)
KEYS, VALUES = torch.empty(2, 256, 8, 128, dtype=DTYPE)


def launch_pack() -> None:
    latent = torch.empty(256, 1, 576, dtype=DTYPE)
    with_gaps = torch.empty(256, 2, 128, dtype=DTYPE)[:, :1]
    for parts in ([[KEYS] * 2, [VALUES] * 2], [[latent] * 2], [[with_gaps] * 2]):
        pool = PagedPool.of(parts, page_size=64)
        blocks = torch.empty(2, pool.block_bytes, dtype=torch.uint8)
        for into_blocks in (True, False):
            pack.move(pool, TOKENS[:2], blocks, pool.checked_range(None), into_blocks=into_blocks)


def launch_rotate() -> None:
    for interleaved in (False, True):
        moves = Moves(TOKENS, TOKENS, TOKENS, TOKENS)
        rotate.rotate_keys(KEYS, VALUES, moves, Rotary(torch.ones(32), interleaved))


def launch_attention() -> None:
    bounds, slots = torch.tensor([0, 100]), torch.empty(4, 512, dtype=torch.int32)
    queries = SparseQueries(TOKENS, bounds, TOKENS[:1], slots, most=100)
    for dim, dtype in ((64, DTYPE), (128, DTYPE), (256, DTYPE), (256, torch.float32)):
        query, pool = torch.empty(100, 96, dim, dtype=dtype), torch.empty(256, 8, dim, dtype=dtype)
        attention.sparse_query_attention(query, pool, pool, queries, 0.1, query)


def launch_deviation() -> None:
    rows = [Rows(KEYS[:100], KEYS), Rows(VALUES[:100], VALUES)]
    deviation.deviation_sums(rows, TOKENS, "l2", torch.empty(2, 100))


def launch_checksum() -> None:
    for size in (4 * 4096, 64):
        checksum.chunk_digests(
            torch.empty(2, size, dtype=torch.uint8), torch.empty(2, -(-size // 4096), dtype=torch.int64)
        )


def main(capability: int) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_only(self: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            code = kernel.asm["ptx"]
            compiled.append(
                {
                    "kernel": self.__name__,
                    "accesses": Counter(ACCESS.findall(code)),
                    "shared_bytes": kernel.metadata.shared,
                    "tensor_cores": "mma" in code,
                    "approximate": bool(re.search(r"\b(?:sin|cos)\.approx", code)),
                    "machine_code_bytes": len(kernel.asm["cubin"]),
                }
            )

        return launch

    driver.set_active(AbsentGpu(capability))
    JITFunction.__getitem__ = compile_only
    for launch in (launch_pack, launch_rotate, launch_attention, launch_deviation, launch_checksum):
        launch()
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
