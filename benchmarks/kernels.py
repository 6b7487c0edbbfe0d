"""The Triton kernels on a GPU: bytes moved, over what the device's own copy moves in that time.

    python -m benchmarks.kernels --model glm-4.5 --tensor-parallel 8 --json kernels.jsonl

The figures are open: no GPU has run this yet. The goal is 0.85 of the copy bandwidth for packing and
unpacking. Without a GPU the script prepares the shapes, prints what each kernel would move, and ends with
status 2.

Bytes moved are those that must be read plus those that must be written. The copy reads and writes 1 GiB each.
Every run begins with cold caches (triton.testing.do_bench); figures are medians. Packing, unpacking and
checksums take all layers of ``--blocks`` pages in one launch. The others work on one layer, as they do in a
forward pass: at few tokens they measure a launch. Attention at long contexts is bound by arithmetic, so its
line also has floating-point operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch

from polarkv_sglang.kernels.attention import SparseQueries, sparse_query_attention
from polarkv_sglang.kernels.checksum import CHUNK_BYTES, chunk_digests
from polarkv_sglang.kernels.deviation import Rows, kv_deviation
from polarkv_sglang.kernels.layout import PagedPool
from polarkv_sglang.kernels.pack import pack_blocks, unpack_blocks
from polarkv_sglang.kernels.rotate import Moves, Rotary, rotate_keys

_COPY_BYTES: Final = 1 << 30
_DTYPE: Final = torch.bfloat16


class Model(NamedTuple):
    layers: int
    heads: int
    parts: tuple[tuple[int, int], ...]  # (KV heads, dim) of K and V; of the latent KV for MLA
    rotary_dims: int


MODELS: Final = {
    "glm-4.5": Model(92, 96, ((8, 128), (8, 128)), 64),
    "glm-4.5-air": Model(46, 96, ((8, 128), (8, 128)), 64),
    "llama-3-70b": Model(80, 64, ((8, 128), (8, 128)), 128),
    "deepseek-v3": Model(61, 128, ((1, 576),), 64),
}


class Workload(NamedTuple):
    model: Model  # of one rank
    page_size: int
    blocks: int
    context: int  # tokens of the request whose keys and rows are worked on
    ratio: float  # of its tokens that ask


class Kernel(NamedTuple):
    name: str
    bytes_moved: int
    operations: int  # floating-point ones; 0 where bytes are all that counts
    prepare: Callable[[torch.device], Callable[[], object]]  # allocates operands; what it returns runs once


def rank_of(model: Model, tensor_parallel: int) -> Model:
    """The share of one rank: heads are split, and KV heads too, but each rank has at least one."""
    if model.heads % tensor_parallel:
        raise ValueError(f"{model.heads} heads cannot be split over {tensor_parallel} ranks")
    parts = tuple((max(1, heads // tensor_parallel), dim) for heads, dim in model.parts)
    return model._replace(heads=model.heads // tensor_parallel, parts=parts)


def kernels(work: Workload) -> Iterator[Kernel]:
    """What can be measured; nothing is allocated before ``prepare``."""
    model = work.model
    token_bytes = sum(heads * dim for heads, dim in model.parts) * _DTYPE.itemsize
    block_bytes = model.layers * work.page_size * token_bytes
    all_blocks = work.blocks * block_bytes
    yield Kernel("pack_blocks", 2 * all_blocks, 0, lambda device: _pack(work, device, unpack=False))
    yield Kernel("unpack_blocks", 2 * all_blocks, 0, lambda device: _pack(work, device, unpack=True))
    digests = work.blocks * -(-block_bytes // CHUNK_BYTES) * 8
    yield Kernel(
        "checksum_blocks", all_blocks + digests, 0, lambda device: _checksum(work, block_bytes, device)
    )

    heads, dim = model.parts[0]
    keys = work.context * heads * dim * _DTYPE.itemsize
    yield Kernel("rotate_keys", 2 * keys, 0, lambda device: _rotate(work, device))
    if len(model.parts) == 1:
        return  # CacheBlend, which needs the other two, does without MLA
    layer = work.context * token_bytes
    yield Kernel("kv_deviation", 2 * layer + 4 * work.context, 0, lambda device: _deviation(work, device))
    asking = len(_asking(work))
    query = asking * model.heads * dim * _DTYPE.itemsize
    seen = int(_asking(work).sum()) + asking
    operations = 4 * seen * model.heads * dim
    yield Kernel(
        "sparse_query_attention", layer + 2 * query, operations, lambda device: _attention(work, device)
    )


def _layer(work: Workload, part: int, slots: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(slots, *work.model.parts[part], dtype=_DTYPE, device=device)


def _asking(work: Workload) -> torch.Tensor:
    """Positions spread evenly over the context."""
    return torch.linspace(0, work.context - 1, max(1, round(work.ratio * work.context))).long()


def _scattered(work: Workload, device: torch.device) -> torch.Tensor:
    """The slots of the context's tokens: whole pages in random order, in a pool twice as large."""
    pages = -(-work.context // work.page_size)
    order = torch.randperm(2 * pages)[:pages, None] * work.page_size + torch.arange(work.page_size)
    return order.flatten()[: work.context].to(device)


def _slots(work: Workload) -> int:
    return 2 * -(-work.context // work.page_size) * work.page_size


def _pack(work: Workload, device: torch.device, *, unpack: bool) -> Callable[[], object]:
    slots = 2 * work.blocks * work.page_size
    parts = [
        [_layer(work, part, slots, device) for _ in range(work.model.layers)]
        for part in range(len(work.model.parts))
    ]
    pool = PagedPool.of(parts, work.page_size)
    starts = (torch.randperm(2 * work.blocks)[: work.blocks] * work.page_size).to(device)
    blocks = torch.zeros(work.blocks, pool.block_bytes, dtype=torch.uint8, device=device)
    call = unpack_blocks if unpack else pack_blocks
    return lambda: call(pool, starts, blocks)


def _checksum(work: Workload, block_bytes: int, device: torch.device) -> Callable[[], object]:
    blocks = torch.zeros(work.blocks, block_bytes, dtype=torch.uint8, device=device)
    return lambda: chunk_digests(blocks)


def _rotate(work: Workload, device: torch.device) -> Callable[[], object]:
    source, target = (_layer(work, 0, _slots(work), device) for _ in range(2))
    at = torch.arange(work.context, device=device)
    moves = Moves(_scattered(work, device), _scattered(work, device), at, at + 1000)
    pairs = work.model.rotary_dims // 2
    latent = len(work.model.parts) == 1
    first = source.shape[2] - work.model.rotary_dims if latent else 0
    rotary = Rotary(1e6 ** -(torch.arange(pairs, device=device) / pairs), interleaved=latent, first=first)
    return lambda: rotate_keys(source, target, moves, rotary)


def _deviation(work: Workload, device: torch.device) -> Callable[[], object]:
    rows = [
        Rows(_layer(work, part, work.context, device), _layer(work, part, _slots(work), device))
        for part in (1, 0)
    ]
    slots = _scattered(work, device)
    return lambda: kv_deviation(rows, slots)


def _attention(work: Workload, device: torch.device) -> Callable[[], object]:
    positions = _asking(work).to(device)
    keys, values = (_layer(work, part, _slots(work), device) for part in (0, 1))
    query = torch.zeros(len(positions), work.model.heads, keys.shape[2], dtype=_DTYPE, device=device)
    queries = SparseQueries(
        positions=positions,
        bounds=torch.tensor([0, len(positions)], device=device),
        rows=torch.zeros(1, dtype=torch.int64, device=device),
        slots=_scattered(work, device)[None],
        most=len(positions),
    )
    return lambda: sparse_query_attention(query, keys, values, queries, keys.shape[2] ** -0.5)


def _seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1e3


def _copy_gbps(device: torch.device) -> float:
    source, target = (torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source)) / 1e9


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Bytes that the kernels move on a GPU, over its copy.",
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="glm-4.5")
    parser.add_argument(
        "--tensor-parallel", type=int, default=8, help="ranks; shapes are those of one (%(default)s)"
    )
    parser.add_argument("--page-size", type=int, default=64, help="tokens (%(default)s)")
    parser.add_argument("--blocks", type=int, default=64, help="pages packed at once (%(default)s)")
    parser.add_argument(
        "--context", type=int, default=32_768, help="tokens of the blended request (%(default)s)"
    )
    parser.add_argument("--ratio", type=float, default=0.15, help="of them that are recomputed (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write one JSON object a kernel")
    parsed = parser.parse_args(arguments)
    if min(parsed.tensor_parallel, parsed.page_size, parsed.blocks, parsed.context) < 1:
        parser.error("--tensor-parallel, --page-size, --blocks and --context must be at least 1")
    if not 0 < parsed.ratio <= 1:
        parser.error(f"--ratio is {parsed.ratio}; it must be above 0 and at most 1")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        model = rank_of(MODELS[parsed.model], parsed.tensor_parallel)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    work = Workload(model, parsed.page_size, parsed.blocks, parsed.context, parsed.ratio)
    if not torch.cuda.is_available():
        for kernel in kernels(work):
            print(
                f"{kernel.name:24} {kernel.bytes_moved / 1e6:10.1f} MB {kernel.operations / 1e9:10.1f} GFLOP"
            )
        print("This benchmark needs a GPU, and PyTorch finds none: nothing was measured.", file=sys.stderr)
        return 2

    device = torch.device("cuda")
    copy_gbps = _copy_gbps(device)
    print(f"{torch.cuda.get_device_name(device)}: a copy moves {copy_gbps:.0f} GB/s")
    results = []
    for kernel in kernels(work):
        seconds = _seconds(kernel.prepare(device))
        gbps = kernel.bytes_moved / seconds / 1e9
        result = {
            "kernel": kernel.name,
            "device": torch.cuda.get_device_name(device),
            "seconds": seconds,
            "bytes_moved": kernel.bytes_moved,
            "gbps": gbps,
            "copy_gbps": copy_gbps,
            "of_copy": gbps / copy_gbps,
            "tflops": kernel.operations / seconds / 1e12,
            **{name: value for name, value in vars(parsed).items() if name != "json"},
        }
        results.append(result)
        arithmetic = f", {result['tflops']:.1f} TFLOP/s" if kernel.operations else ""
        print(
            f"{kernel.name:24} {seconds * 1e6:10.1f} us {gbps:8.0f} GB/s, {result['of_copy']:.2f} of the copy"
            + arithmetic
        )
    if parsed.json is not None:
        with open(parsed.json, "w") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
