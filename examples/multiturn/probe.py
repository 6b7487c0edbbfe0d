"""What a prompt costs that is restored from L3, beside the same one as an L1 hit, on an idle engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import msgspec
import numpy as np

from examples.multiturn.load import Client

L1_HITS = 3
_WAKE_TOKENS = 32
_COPIES = 5


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one system over the probed prompts."""

    prompts: int  # that L3 gave most of; of the others no time is counted
    missed: int
    restored_ttft_s: float
    l1_ttft_s: float
    ratio: float  # median of the prompts' own ratios


async def restore(client: Client, prompts: Sequence[list[int]]) -> Restore:
    """Flush L1 and L2 before each prompt, ask it, and ask it again at once ``L1_HITS`` times."""
    restored, hits, missed = [], [], 0
    for prompt in prompts:
        await client.flush_cache()
        await _wake(client, prompt)
        first = await client.generate(prompt, 1)
        if 2 * first.hits.storage < len(prompt):
            missed += 1
            continue
        again = []
        for _ in range(L1_HITS):
            await _wake(client, prompt)
            again.append((await client.generate(prompt, 1)).ttft_s)
        restored.append(first.ttft_s)
        hits.append(median(again))
    nothing = float("nan")
    return Restore(
        prompts=len(restored),
        missed=missed,
        restored_ttft_s=median(restored) if restored else nothing,
        l1_ttft_s=median(hits) if hits else nothing,
        ratio=median(one / hit for one, hit in zip(restored, hits, strict=True)) if restored else nothing,
    )


async def _wake(client: Client, prompt: list[int]) -> None:
    """A short request before a timed one: an engine that has slept is compared with none that has not."""
    await client.generate(prompt[::-1][:_WAKE_TOKENS], 2)


def copy_seconds(length_bytes: int) -> float:
    """Seconds that one memcpy of so many bytes takes on this machine, the median of a few."""
    source = np.ones(length_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(_COPIES):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return median(seconds)
