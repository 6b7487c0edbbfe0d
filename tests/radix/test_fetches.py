"""Requests that wait together: whose pages are fetched, and that none is computed for want of room."""

from __future__ import annotations

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.radix.fetches import Fetches
from tests.radix.harness import Queued, an_engine, prompt
from tests.support import running_node

_INTERVAL, _ATTEMPTS = 8, 8


def _queue(*rids: str) -> list[Queued]:
    return [Queued(rid, []) for rid in rids]


def _begun(fetches: Fetches, *queue: str) -> list[str]:
    return [request.rid for request, _ in fetches.pop_ready(_queue(*queue), _INTERVAL, _ATTEMPTS)]  # type: ignore[arg-type]


def test_a_queue_that_l2_has_no_room_for_is_fetched_one_after_another() -> None:
    with running_node("64MiB") as node:
        config = PolarConfig(nodes=(node.address,))
        with an_engine(config, l1_tokens=512, l2_ratio=1.5) as engine:
            prompts = [prompt(number, 256) for number in range(4)]
            for tokens in prompts:
                engine.serve(tokens)
            engine.forget()
            waiting = [Queued(f"waiting {number}", tokens) for number, tokens in enumerate(prompts)]
            for request in waiting:
                engine.fetch(request)
            engine.settle(lambda: engine.cache.check_prefetch_progress(waiting[0].handle))
            assert not any(engine.cache.check_prefetch_progress(request.handle) for request in waiting[1:])
            sources = []
            while waiting:
                sources.append(engine.admit(waiting.pop(0)))
                for request, _ in engine.cache.fetches.pop_ready(waiting, _INTERVAL, _ATTEMPTS):
                    engine.fetch(request)
            assert sources == [(0, 0, 256)] * 4
            engine.cache.sanity_check()


def test_what_is_in_the_pool_is_fetched_after_an_abort_of_the_request_before() -> None:
    with running_node("64MiB") as node:
        config = PolarConfig(nodes=(node.address,))
        with an_engine(config, l1_tokens=512, l2_ratio=1.5) as engine:
            for number in range(2):
                engine.serve(prompt(number, 256))
            engine.forget()
            first, second = (Queued(f"waiting {number}", prompt(number, 256)) for number in range(2))
            engine.fetch(first)
            engine.fetch(second)
            engine.cache.release_aborted_request(first.handle)
            ((ready, _),) = engine.cache.fetches.pop_ready([second], _INTERVAL, _ATTEMPTS)
            engine.fetch(ready)
            assert engine.admit(second) == (0, 0, 256)


def test_fetches_begin_in_order_and_small_ones_do_not_overtake() -> None:
    fetches = Fetches(lambda: 100)
    assert fetches.may_begin("a", 300), "alone, any length"
    fetches.hold("a", 300)
    for rid, tokens in (("b", 90), ("c", 10), ("d", 20)):
        assert not fetches.may_begin(rid, tokens)
        fetches.wait(rid, tokens, None)
    assert _begun(fetches, "a", "b", "c", "d") == []
    fetches.cancel("a")  # admitted
    assert not fetches.may_begin("e", 1), "others wait"
    assert _begun(fetches, "b", "c", "d") == ["b", "c"]
    assert fetches.may_begin("b", 90), "it is its turn"
    assert fetches.is_waiting("d")
    fetches.poll_miss("b")  # the pool had nothing
    assert _begun(fetches, "b", "c", "d") == ["d"]


def test_requests_that_left_the_queue_hold_nothing() -> None:
    fetches = Fetches(lambda: 100)
    fetches.hold("a", 100)
    fetches.wait("b", 50, 7)
    assert fetches.pop_ready(_queue("b"), _INTERVAL, _ATTEMPTS) == [(Queued("b", []), 7)]  # type: ignore[arg-type]
    fetches.wait("c", 50, None)
    assert _begun(fetches, "b") == []
    assert not fetches.is_waiting("c")
    fetches.hold("d", 100)
    fetches.clear()
    assert fetches.may_begin("e", 100)
