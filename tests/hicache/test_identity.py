"""Who may use whose KV: only an engine with the same weights, dtype, layout, ranks, salt and adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.weights import WeightsIdentity
from tests.radix.harness import Engine, an_engine, prompt
from tests.support import RunningNode, running_node

PROMPT = prompt(1, 256)


@pytest.fixture(scope="module")
def config() -> Iterator[PolarConfig]:
    with running_node("64MiB") as node:
        with an_engine(config := PolarConfig(nodes=(node.address,))) as engine:
            engine.serve(PROMPT, salt="tenant A", extra_key="adapter A")
            engine.serve(PROMPT)
            engine.settle()
        yield config


def test_an_equal_engine_hits(config: PolarConfig) -> None:
    with an_engine(config) as engine:
        assert engine.serve(PROMPT) == (0, 0, 256)
    with an_engine(config) as engine:
        assert engine.serve(PROMPT, salt="tenant A", extra_key="adapter A") == (0, 0, 256)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "weights B"},
        {"dtype": torch.float16},
        {"page_tokens": 32},
        {"mla": True},
    ],
    ids=["weights", "dtype", "page size", "layout"],
)
def test_another_engine_never_hits(config: PolarConfig, other: dict[str, object]) -> None:
    with an_engine(config, **other) as engine:
        assert engine.serve(PROMPT) == (0, 0, 0)


def test_the_two_kinds_of_fp8_never_hit_each_other(config: PolarConfig) -> None:
    """SGLang keeps both as uint8, in L1 and in L2."""
    with an_engine(config, dtype=torch.float8_e4m3fn) as engine:
        engine.serve(PROMPT)
        engine.forget()
        assert engine.serve(PROMPT) == (0, 0, 256)
    with an_engine(config, dtype=torch.float8_e5m2) as engine:
        assert engine.serve(PROMPT) == (0, 0, 0)


def test_another_model_with_equal_weights_never_hits(config: PolarConfig) -> None:
    with an_engine(config) as engine:
        engine.runtime.weights._identify = lambda: WeightsIdentity("weights A", "other rope scaling")
        engine.runtime.weights.suspend()
        engine.runtime.weights.name()
        engine.runtime.weights.adopt()
        assert engine.serve(PROMPT) == (0, 0, 0)


@pytest.mark.parametrize(
    "ranks",
    [
        {"tp_size": 2},
        {"tp_size": 2, "tp_rank": 1},
        {"pp_size": 2},
        {"pp_size": 2, "pp_rank": 1},
        {"attn_cp_size": 2},
        {"attn_cp_size": 2, "attn_cp_rank": 1},
    ],
    ids=str,
)
def test_another_shard_never_hits(config: PolarConfig, ranks: dict[str, int]) -> None:
    with an_engine(config) as engine:
        storage = engine.cache.cache_controller.storage_backend
        storage._ranks = dataclasses.replace(storage._ranks, **ranks)
        storage._names = None
        assert engine.serve(PROMPT) == (0, 0, 0)


@pytest.mark.parametrize(
    ("salt", "extra_key"),
    [("tenant B", None), ("tenant B", "adapter A"), ("tenant A", "adapter B"), (None, "adapter A")],
)
def test_another_tenant_or_adapter_never_hits(
    config: PolarConfig, salt: str | None, extra_key: str | None
) -> None:
    with an_engine(config) as engine:
        assert engine.serve(PROMPT, salt=salt, extra_key=extra_key) == (0, 0, 0)


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with running_node("64MiB") as running:
        yield running


def update_weights(engine: Engine, weights: str, *, flush: bool) -> None:
    """What the hook around SGLang's weight updates does, with the update in the middle."""
    guard = engine.runtime.weights
    guard.suspend()
    engine.cache.drain_storage()
    engine.weights = weights
    if flush:
        engine.cache.reset()
        engine.allocator.clear()
    guard.name()
    if engine.cache.is_clean:
        guard.adopt()


def test_after_an_update_old_kv_is_not_served_and_new_kv_not_mixed_with_it(node: RunningNode) -> None:
    with an_engine(PolarConfig(nodes=(node.address,))) as engine:
        engine.serve(PROMPT)
        engine.settle()
        update_weights(engine, "weights B", flush=True)
        assert engine.serve(PROMPT) == (0, 0, 0)
        engine.settle()
        assert node.statistics().blocks == 32
        engine.forget()
        assert engine.serve(PROMPT) == (0, 0, 256)
        # Named by content: going back finds what was computed under the first weights.
        update_weights(engine, "weights A", flush=True)
        assert engine.serve(PROMPT) == (0, 0, 256)


def test_writes_in_flight_at_an_update_are_never_stored_under_the_new_weights(node: RunningNode) -> None:
    with an_engine(PolarConfig(nodes=(node.address,))) as engine:
        for number in range(1, 4):
            # No steps in between: the update meets writes at every stage.
            engine.serve(prompt(number, 128))
            update_weights(engine, f"weights {number}", flush=True)
            assert engine.serve(prompt(number, 128)) == (0, 0, 0)


def test_after_an_update_without_a_flush_nothing_is_shared_until_there_was_one(node: RunningNode) -> None:
    with an_engine(PolarConfig(nodes=(node.address,))) as engine:
        engine.serve(PROMPT)
        update_weights(engine, "weights B", flush=False)
        before = node.statistics().blocks
        engine.serve(prompt(2, 256))
        engine.settle()
        assert node.statistics().blocks == before
        engine.forget()
        assert engine.serve(prompt(2, 256)) == (0, 0, 0)
        engine.settle()
        assert node.statistics().blocks == before + 16
