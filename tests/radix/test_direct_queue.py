"""Requests that are set aside until the pool was heard of go back to where they were."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.engine import _choose_prefill
from polarkv_sglang.radix.direct import in_order
from tests.faults.nodes import FaultyNode
from tests.hicache.direct_harness import a_direct_engine
from tests.radix.harness import prompt

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


def test_a_queue_keeps_its_order_and_what_was_preempted_comes_last() -> None:
    a, b, c, d, preempted = (
        Req(name, "", array("q", [1]), SamplingParams(max_new_tokens=1)) for name in ("a", "b", "c", "d", "e")
    )
    # b was admitted, a and c were set aside.
    assert in_order([a, b, c, d], [d, preempted, a, c]) == [a, c, d, preempted]


def test_a_request_is_looked_up_while_its_grammar_is_compiled() -> None:
    with (
        FaultyNode("64MiB").start() as node,
        a_direct_engine(PolarConfig(nodes=(node.address,), mode="direct", deadline_s=0.5)) as engine,
    ):
        lookups = engine.linker.lookups
        engine.serve(prompt(1, 256))
        engine.forget()
        queued, with_grammar = (engine.request([*prompt(1, 256), last]) for last in (7, 8))
        manager = SimpleNamespace(grammar_queue=[with_grammar])
        scheduler = cast(
            "Scheduler",
            SimpleNamespace(tree_cache=engine.cache, waiting_queue=[queued], grammar_manager=manager),
        )
        seen: list[list[Req]] = []

        def choose(scheduler: Scheduler, _running: ScheduleBatch) -> None:
            seen.append(list(scheduler.waiting_queue))

        def schedule() -> None:
            _choose_prefill(choose, scheduler, cast("ScheduleBatch", None))

        node.freeze()
        schedule()
        assert seen[-1] == [], "the pool was not heard of"
        assert scheduler.waiting_queue == [queued], "the other waits for its grammar"
        node.thaw()
        lookups.patience_s = 10.0
        lookups.wait([queued.rid, with_grammar.rid])
        schedule()
        assert seen[-1] == [queued]
        # Its grammar is ready.
        scheduler.waiting_queue.append(manager.grammar_queue.pop())
        answered = lookups.find(with_grammar.rid)
        assert answered is not None
        assert answered.done
        schedule()
        assert seen[-1] == [queued, with_grammar]
        assert lookups.find(with_grammar.rid) is answered, "it is not asked for again"
