"""One rank of several that choose rows together, each by the heads it has: prints its choices, as JSON."""

from __future__ import annotations

import json
import sys

import torch
from sglang.srt.distributed.parallel_state import init_world_group

from polarkv_sglang.blend.select import choose_together
from polarkv_sglang.kernels.deviation import Rows, deviation_sums

if __name__ == "__main__":
    seed, rank, ranks, port = (int(text) for text in sys.argv[1:])
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    group = init_world_group(list(range(ranks)), local_rank=rank, backend="gloo")
    fresh, cached = torch.randn(2, 200, 4, 16, generator=torch.Generator().manual_seed(seed))
    heads = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    rows = Rows(fresh[:, heads].contiguous(), cached[:, heads].contiguous())
    sums = deviation_sums([rows], torch.arange(200))
    print("RESULT", json.dumps([choose_together(sums.clone(), n, group).tolist() for n in (1, 30, 100, 200)]))
