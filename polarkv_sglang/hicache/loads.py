"""What the linker of direct mode has under way: loads of batches, and offloads."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

import torch

from polarkv_sglang.hicache.lookups import Lookup
from polarkv_sglang.pool.blocks import Chain


class Load(NamedTuple):
    """Blocks that one request is waiting for."""

    rid: str
    chain: Chain
    starts: torch.Tensor  # first slots of their pages, int64 [blocks] on the CPU
    lookup: Lookup  # which keeps them in the pool


class Landed(NamedTuple):
    """How the loads of one forward pass ended."""

    requests: dict[str, bool]  # whether all of their blocks are in L1 and right
    tainted: bool  # whether the pass may have computed with bytes that turned out to be wrong


class Batch(NamedTuple):
    """The loads of one forward pass."""

    number: int  # the load counter's
    loads: list[Load]
    ready: list[torch.cuda.Event]  # nothing uses what the slots held before once these have passed
    landed: Future[Landed]


class Offload(NamedTuple):
    """Blocks of one tree node on their way to the pool."""

    epoch: int
    chain: Chain
    starts: torch.Tensor
    ready: list[torch.cuda.Event]  # L1 holds the KV once these have passed
