"""Look-ups of direct mode in process: what waiting requests keep in the pool, and how long they wait."""

from __future__ import annotations

import random
import time

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from polarkv_sglang.hicache import lookups
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.blocks import Chain
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.pool.finder import Kept
from tests.faults.nodes import FaultyNode
from tests.hicache.direct_harness import (
    DEADLINE_S,
    a_direct_engine,
    abort_queued,
    direct_settings,
    wait_for_no_lease,
)
from tests.radix.harness import prompt


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        pytest.param(256, True, id="kept"),
        pytest.param(4800, False, id="more than a node keeps", marks=pytest.mark.slow),
    ],
)
def test_what_a_lookup_found_stays_until_it_is_loaded(tokens: int, kept: bool) -> None:
    with (
        FaultyNode("16MiB").start() as node,
        a_direct_engine(direct_settings(node), l1_tokens=5120) as engine,
        a_direct_engine(direct_settings(node), l1_tokens=2048) as others,
    ):
        engine.serve(prompt(1, tokens))
        engine.forget()

        def evict() -> None:
            assert node.statistics().leases == kept
            for number in range(2, 12):
                others.serve(prompt(number, 1024))
                others.settle()
            assert node.statistics().evictions_total > 0

        served = engine.serve(prompt(1, tokens), before_load=evict)
        if kept:
            assert served == (0, 0, tokens)
        assert engine.recomputed == (0 if kept else 1)
        engine.check_integrity()
        wait_for_no_lease(node)


def test_a_request_in_the_queue_keeps_what_it_will_load_until_it_leaves(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "LEASE_S", 1.0)
    monkeypatch.setattr(lookups, "_RENEW_S", 0.2)
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.serve(prompt(2, 256))
        engine.forget()
        # The last token is computed whatever is cached.
        aborted, gone = (engine.request([*prompt(number, 256), 7]) for number in (1, 2))
        engine.look_up(aborted, gone)
        assert node.statistics().leases == 2
        assert node.statistics().leased_bytes == node.statistics().used_bytes
        # Longer than a lease, and never without a new lookup to make.
        flood, end = engine.linker.lookups, time.monotonic() + 2.5
        digest = engine.linker._names.digest()
        assert digest is not None
        while time.monotonic() < end:
            while flood._work.qsize() < 100:
                key = random.randbytes(16)
                flood.begin(key.hex(), digest, [key.hex()], Chain([key], [NO_PARENT], [key]))
            time.sleep(1e-3)
        now = node.statistics()
        assert (now.leases, now.expired_leases_total) == (2, 0)
        engine.cache.release_aborted_request(aborted.cache_request_handle)
        node.wait_until(lambda now: now.leases == 1, "the lease of the aborted request is released")
        # Whatever else takes a request from the queue.
        assert engine.cache.look_up([]) == []
        wait_for_no_lease(node)


def test_a_load_that_is_queued_and_cancelled_keeps_nothing(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        abort_queued(engine, prompt(1, 256))
        wait_for_no_lease(node)
        engine.check_integrity()


def test_the_scheduler_does_not_wait_for_a_node_that_does_not_answer(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        node.freeze()
        waiting = engine.request([*prompt(1, 256), 7])
        assert engine.cache.look_up([waiting]) == [waiting], "the answer cannot have come"
        passes = 1
        while engine.cache.look_up([waiting]):
            passes += 1
        assert passes > 2
        assert engine.cache.match_prefix(engine.match_of(waiting)).host_hit_length == 0
        node.thaw()


def test_requests_wait_for_slow_answers_no_longer_than_a_deadline(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is asked for one after another; ten would take six deadlines."""
    hold = PoolClient.hold

    def hold_slowly(client: PoolClient, chain: Chain, lease_s: float) -> Kept:
        time.sleep(0.6 * DEADLINE_S)
        return hold(client, chain, lease_s)

    monkeypatch.setattr(PoolClient, "hold", hold_slowly)
    with a_direct_engine(direct_settings(node)) as engine:
        waiting = [engine.request([*prompt(number, 256), 7]) for number in range(10)]
        engine.look_up(*waiting)
        last = engine.linker.lookups.find(waiting[-1].rid)
        assert last is not None
        assert not last.done, "it waited for an answer that took longer"
        assert engine.cache.match_prefix(engine.match_of(waiting[-1])).host_hit_length == 0
        assert engine.cache.look_up([]) == []
        wait_for_no_lease(node)


@pytest.mark.parametrize("core", ["rust", pytest.param("python", marks=pytest.mark.slow)])
def test_a_request_that_loses_its_prefix_in_l1_waits_for_what_the_pool_has_of_it(
    node: FaultyNode, core: str
) -> None:
    with a_direct_engine(direct_settings(node), core=core) as engine:
        tokens = prompt(1, 256)
        engine.serve(tokens)
        engine.forget()
        engine.serve(tokens[:128])
        engine.settle()
        waiting = engine.request([*tokens, 7])
        engine.look_up(waiting)
        before = engine.linker.lookups.find(waiting.rid)
        engine.cache.evict_for_alloc(EvictParams(num_tokens=128))
        node.freeze()
        assert engine.cache.look_up([waiting]) == [waiting], "the answer cannot have come"
        asked = engine.linker.lookups.find(waiting.rid)
        assert asked is not before
        engine.cache.look_up([waiting])
        assert engine.linker.lookups.find(waiting.rid) is asked, "it is asked for once"
        node.thaw()
        engine.look_up(waiting)
        assert engine.cache.match_prefix(engine.match_of(waiting)).host_hit_length == 256
        assert engine.cache.look_up([]) == []
        wait_for_no_lease(node)


def test_a_pass_does_not_wait_for_requests_whose_prefix_it_has_evicted(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        prompts = [prompt(number, 256) for number in (1, 2)]
        for tokens in prompts:
            engine.serve(tokens)
        engine.forget()
        for tokens in prompts:
            engine.serve(tokens[:128])
        engine.settle()
        waiting = [engine.request([*tokens, 7]) for tokens in prompts]
        engine.look_up(*waiting)
        assert engine.cache.look_up(waiting) == [], "a scheduling pass begins"
        engine.cache.evict_for_alloc(EvictParams(num_tokens=256))
        node.freeze()
        for request in waiting:
            assert engine.cache.match_prefix(engine.match_of(request)).host_hit_length == 0
        asked = [engine.linker.lookups.find(request.rid) for request in waiting]
        assert not any(each is None or each.done for each in asked), "it waited for the node"
        node.thaw()


def test_requests_that_wait_across_a_flush_are_looked_up_again(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        waiting = engine.queued(prompt(1, 256))
        engine.forget()
        assert engine.linker.lookups.find(waiting.rid) is None
        engine.look_up(waiting)
        assert engine.linker.lookups.find(waiting.rid) is not None
        assert engine.cache.match_prefix(engine.match_of(waiting)).host_hit_length == 256
