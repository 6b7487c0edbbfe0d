"""PolarRadixCache: what leaves L1 and L2 comes back from the pool, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sglang.srt.mem_cache.cpp_utils import native_hash

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.radix import Decision, NodeView, Rates
from tests.radix.harness import Engine, an_engine, prompt
from tests.support import RunningNode, running_node


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with running_node("64MiB") as running:
        yield running


def settings(node: RunningNode, spill: str = "share", **more: object) -> PolarConfig:
    return PolarConfig(nodes=(node.address,), spill=spill, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_a_prompt_comes_back_after_l1_and_l2_are_lost(node: RunningNode, mla: bool, core: str) -> None:
    with an_engine(settings(node), mla=mla, core=core) as engine:
        assert engine.serve(prompt(1, 256)) == (0, 0, 0)
        assert engine.serve(prompt(1, 256)) == (256, 0, 0)
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)
        engine.cache.sanity_check()


def test_sglangs_page_hash_is_compiled_before_anything_is_served() -> None:
    """A storage thread that compiled it at a first request would be waited for by a flush, in vain."""
    native_hash._load_native_hash_module.cache_clear()
    with an_engine(PolarConfig(nodes=("127.0.0.1:1",))):
        assert native_hash._load_native_hash_module.cache_info().currsize == 1


def test_what_one_engine_computed_another_fetches_at_once(node: RunningNode) -> None:
    with an_engine(settings(node)) as first, an_engine(settings(node)) as second:
        first.serve(prompt(1, 256))
        first.settle()
        assert second.serve(prompt(1, 256)) == (0, 0, 256)


def test_a_partial_hit_is_used_and_only_the_rest_computed(node: RunningNode) -> None:
    with an_engine(settings(node)) as engine:
        engine.serve(prompt(1, 128))
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 128)
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)


def test_a_prefix_that_is_cached_is_continued_from_several_memory_nodes(node: RunningNode) -> None:
    """With short stripes, so that a page that is looked for in the wrong place is missed."""
    with running_node("64MiB") as other:
        config = PolarConfig(nodes=(node.address, other.address), stripe_pages=2)
        with an_engine(config) as engine:
            engine.serve(prompt(1, 400))
            engine.forget()
            assert engine.serve(prompt(1, 80)) == (0, 0, 80)
            assert engine.serve(prompt(1, 208)) == (80, 0, 128)
            assert engine.serve(prompt(1, 400)) == (208, 0, 192)


@pytest.mark.parametrize("spill", ["share", "evict"])
def test_more_prompts_than_l1_and_l2_hold_all_come_back(node: RunningNode, spill: str) -> None:
    with an_engine(settings(node, spill), l1_tokens=512, l2_ratio=1.5) as engine:
        for number in range(12):
            engine.serve(prompt(number, 128))
            engine.settle()
        sources = [engine.serve(prompt(number, 128)) for number in range(12)]
        from_pool = sum(l3 for _, _, l3 in sources)
        assert from_pool >= 4 * 128
        computed = 12 * 128 - sum(map(sum, sources))
        assert computed == 0
        engine.cache.sanity_check()


@pytest.mark.parametrize(("watermark", "ahead"), [(0.0, False), (0.6, True)])
def test_spilling_ahead_leaves_no_copy_to_an_allocation(
    node: RunningNode, watermark: float, ahead: bool
) -> None:
    """Under write-back SGLang copies a victim while the allocation waits; ours are copied before."""
    config = settings(node, "evict", spill_watermark=watermark)
    with an_engine(config, l1_tokens=512, l2_ratio=4.0) as engine:
        controller, evict = engine.cache.cache_controller, engine.cache.evict_for_alloc
        write = controller.write
        copies: list[bool] = []  # for each copy, whether an eviction waited for it
        evicting = False

        def watched_write(*args: object, **kwargs: object) -> object:
            copies.append(evicting)
            return write(*args, **kwargs)

        def watched_evict(*args: object, **kwargs: object) -> object:
            nonlocal evicting
            evicting = True
            try:
                return evict(*args, **kwargs)
            finally:
                evicting = False

        controller.write, engine.cache.evict_for_alloc = watched_write, watched_evict
        for number in range(12):
            engine.serve(prompt(number, 128))
            engine.settle()
    assert copies
    assert any(copies) != ahead


def test_under_evict_what_stays_in_l1_is_not_written(node: RunningNode) -> None:
    with an_engine(settings(node, "evict"), l1_tokens=512) as engine:
        engine.serve(prompt(1, 128))
        engine.settle()
        assert node.statistics().blocks == 0
    with an_engine(settings(node, "share"), l1_tokens=512) as engine:
        engine.serve(prompt(1, 128))
        engine.settle()
        assert node.statistics().blocks == 8


class Fixed:
    """A policy of one opinion."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision

    def decide(self, node: NodeView, rates: Rates) -> Decision:
        return self.decision


def test_the_policy_decides_what_is_spilled(node: RunningNode) -> None:
    for decision, blocks in ((Decision.KEEP, 0), (Decision.DROP, 0), (Decision.SPILL, 8)):
        with an_engine(settings(node), policy=Fixed(decision)) as engine:
            engine.serve(prompt(1, 128))
            engine.settle()
            assert node.statistics().blocks == blocks


def test_what_the_policy_drops_goes_to_no_tier(node: RunningNode) -> None:
    for decision, expected in ((Decision.KEEP, 128), (Decision.DROP, 0)):
        with an_engine(
            settings(node, "evict"), policy=Fixed(decision), l1_tokens=256, l2_ratio=4.0
        ) as engine:
            engine.serve(prompt(1, 128))
            engine.serve(prompt(2, 256))  # pushes the first out of L1
            l1, l2, l3 = engine.serve(prompt(1, 128))
            assert (l1, l2, l3) == (0, expected, 0)
            engine.cache.sanity_check()


def test_a_dead_pool_is_only_a_miss(node: RunningNode) -> None:
    with an_engine(settings(node, deadline_s=0.3)) as engine:
        engine.serve(prompt(1, 128))
        engine.forget()
        node.kill()
        assert engine.serve(prompt(1, 128)) == (0, 0, 0)
        assert engine.serve(prompt(1, 128)) == (128, 0, 0)
        engine.settle()
        engine.cache.sanity_check()


def test_an_engine_serves_without_a_pool_and_uses_it_once_it_is_there() -> None:
    with running_node() as gone:
        address = gone.address
        gone.stop()
    with an_engine(PolarConfig(nodes=(address,), deadline_s=0.3)) as engine:
        assert engine.serve(prompt(1, 128)) == (0, 0, 0)
        engine.settle()
        with running_node(listen=address):
            _wait_live(engine)
            engine.serve(prompt(2, 128))
            engine.forget()
            assert engine.serve(prompt(2, 128)) == (0, 0, 128)


def test_storage_can_be_detached_and_attached_again(node: RunningNode) -> None:
    with an_engine(settings(node)) as engine:
        engine.serve(prompt(1, 128))
        engine.settle()
        cache = engine.cache
        config = cache.cache_controller.storage_config.extra_config
        assert cache.detach_storage_backend()[0]
        import json

        attached, why = cache.attach_storage_backend(
            "dynamic", json.dumps({**config, "prefetch_threshold": 16})
        )
        assert attached, why
        engine.forget()
        assert engine.serve(prompt(1, 128)) == (0, 0, 128)


def _wait_live(engine: Engine) -> None:
    import time

    end = time.monotonic() + 15
    while not engine.runtime.client.membership.live:
        assert time.monotonic() < end
        time.sleep(0.05)
