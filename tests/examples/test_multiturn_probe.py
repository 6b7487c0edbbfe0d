from __future__ import annotations

import asyncio
import math
import time
from itertools import pairwise

from examples.multiturn.load import Client
from examples.multiturn.probe import L1_HITS, Restore, copy_seconds, restore
from tests.examples.streaming import Event, Streaming, streaming, tokens

LONG = 100  # tokens from which a prompt is no mere wake-up


class Store:
    """A server that has long prompts in L3, and in L1 once they were asked for since the last flush."""

    def __init__(self, restore_s: float, has: float) -> None:
        self.server = Streaming()
        self._restore_s = restore_s
        self._has = has
        self._in_l1: set[tuple[int, int]] = set()

    def answer(self, prompt: list[int]) -> list[Event]:
        if len(prompt) < LONG:
            return [tokens(1)]
        key = (prompt[0], self.server.flushes)
        if key in self._in_l1:
            return [tokens(1, cached_tokens_details={"device": len(prompt) - 1})]
        self._in_l1.add(key)
        time.sleep(self._restore_s)
        return [tokens(1, cached_tokens_details={"storage": int(self._has * len(prompt))})]


def probe(store: Store, prompts: list[list[int]]) -> tuple[Restore, Streaming]:
    async def run(url: str) -> Restore:
        async with Client(url) as client:
            return await restore(client, prompts)

    with streaming(store.answer) as server:
        store.server = server
        return asyncio.run(run(server.url)), server


def test_a_restored_prompt_is_timed_beside_its_own_l1_hits():
    prompts = [[number] * LONG for number in (1, 2)]
    measured, server = probe(Store(restore_s=0.3, has=0.9), prompts)
    assert (measured.prompts, measured.missed) == (2, 0)
    assert measured.restored_ttft_s >= 0.3
    assert measured.l1_ttft_s < measured.restored_ttft_s - 0.2
    assert measured.ratio > 1
    assert server.flushes == len(prompts)
    for prompt in prompts:
        assert server.prompts.count(prompt) == 1 + L1_HITS


def test_what_l3_did_not_have_is_missed_and_not_timed():
    measured, _ = probe(Store(restore_s=0.0, has=0.4), [[1] * LONG])
    assert (measured.prompts, measured.missed) == (0, 1)
    assert math.isnan(measured.ratio)


def test_a_memcpy_of_more_takes_longer():
    assert copy_seconds(1 << 20) < copy_seconds(64 << 20) < 10.0


def test_each_timed_prompt_has_a_short_one_before_it():
    _, server = probe(Store(restore_s=0.0, has=0.9), [[1] * LONG, [2] * LONG])
    lengths = [len(prompt) for prompt in server.prompts]
    assert lengths[0] < LONG
    assert all(before < LONG for before, after in pairwise(lengths) if after == LONG)
