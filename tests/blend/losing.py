"""What a scheduler promises where donors, passes or weights fail it; run by test_passes.py in its process."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.managers.cache_controller import LayerDoneCounter
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from polarkv_sglang.blend import blender, forward
from tests.blend.fixtures import ASKED, HEAD, ONE, QUESTION, SEEN, TWO
from tests.blend.scheduler import Scheduler, Served
from tests.engine.servers import prompt

sparse_query_attention = forward.sparse_query_attention


def assert_same_answer(served: Served, expected: Served, within: float = 1e-5) -> None:
    assert (served.logits - expected.logits).abs().max() < within * expected.logits.abs().max()
    assert served.logits.argmax() == expected.logits.argmax()


def test_a_donor_that_was_evicted_is_a_full_prefill(scheduler: Scheduler) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    served = scheduler.serve(ASKED, polarkv_blend=True)
    assert served.counts == (0, 0)
    assert torch.equal(served.logits, expected.logits)
    # It was a plain request then, and is a prefix for others.
    assert scheduler.serve(ASKED).cached_tokens == 576


def test_a_pass_that_fails_is_computed_in_full(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    calls = []

    def breaks(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("the last layer")
        return sparse_query_attention(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "sparse_query_attention", breaks)
    served = scheduler.serve(ASKED, polarkv_blend=True)
    assert len(calls) == 2
    assert served.counts == (0, 0)
    assert_same_answer(served, expected)
    # Nothing is blended after that, and nothing is in the way of plain passes.
    assert scheduler.serve(ASKED, polarkv_blend=True).counts == (0, 0)
    assert len(calls) == 2


def test_no_donor_is_of_other_weights(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    guard = scheduler.cache.runtime.weights
    guard.suspend()  # an update without a flush: the tree keeps what it holds
    assert scheduler.serve(ASKED, polarkv_blend=True).counts == (0, 0)
    guard.name()
    assert scheduler.serve([5, *ASKED], polarkv_blend=True).counts == (0, 0)
    guard.adopt()  # the same bytes as before
    assert scheduler.serve([6, *ASKED], polarkv_blend=True).counts.blended > 0


def test_an_update_between_two_passes_ends_the_blending(scheduler: Scheduler) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    # Nothing has been written after the plan: had it been used, the answer would be another.
    served = scheduler.serve(
        ASKED,
        before_passes=scheduler.cache.runtime.weights.suspend,
        polarkv_blend=True,
        polarkv_blend_ratio=0,
    )
    assert served.counts == (0, 0)
    assert_same_answer(served, expected)
    assert scheduler.cache.protected_size() == 0


def test_a_pass_that_no_rank_can_do_is_computed_in_full_by_all(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that writes its KV by itself, as fused kernels do: all ranks find that out alike."""
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    monkeypatch.setattr(scheduler.blender, "_alone", False)

    def saved_already(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "save_kv_cache": False} if "forward" in module.__dict__ else kwargs

    attention = scheduler.runner.model.model.layers[1].self_attn.attn
    hook = attention.register_forward_pre_hook(saved_already, with_kwargs=True)
    try:
        served = scheduler.serve(ASKED, polarkv_blend=True)
    finally:
        hook.remove()
    assert served.counts == (0, 0)
    assert_same_answer(served, expected)


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_a_document_that_is_gone_in_mid_plan_is_computed_and_the_others_are_blended(
    scheduler: Scheduler, ratio: float
) -> None:
    asked = [5, *TWO, *ONE, *QUESTION]
    expected = scheduler.serve(asked)
    scheduler.forget()
    scheduler.serve(HEAD + TWO)
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    scheduler.serve(HEAD + ONE)
    assert scheduler.blender.index.statistics().donors == 2, "the index knows both"
    served = scheduler.serve(asked, polarkv_blend=True, polarkv_blend_ratio=ratio)
    there = (len(HEAD + ONE)) // 16 * 16 - len(HEAD)  # its last page is not whole
    assert served.counts == ((there, 0) if ratio == 0 else (0, there))
    if ratio == 1:
        assert_same_answer(served, expected, within=1e-4)
    else:
        assert (served.logits - expected.logits).abs().max() > 1e-3 * expected.logits.abs().max()
    assert scheduler.blender.index.statistics().donors == 1
    assert scheduler.cache.protected_size() == 0


def test_a_pass_whose_donors_cannot_be_brought_is_computed_in_full(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)

    def breaks(*_arguments: object) -> None:
        raise MemoryError("no room for its rows")

    monkeypatch.setattr(blender, "BlendPass", breaks)
    served = scheduler.serve(ASKED, polarkv_blend=True, polarkv_blend_ratio=0)
    assert served.counts == (0, 0)
    assert_same_answer(served, expected)
    assert scheduler.cache.protected_size() == 0


def test_plans_that_differ_from_rank_to_rank_are_none(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    monkeypatch.setattr(scheduler.blender, "_agree_on", lambda numbers: [False] * len(numbers))
    served = scheduler.serve(ASKED, polarkv_blend=True, polarkv_blend_ratio=0)
    assert served.counts == (0, 0)
    assert_same_answer(served, expected)
    assert scheduler.cache.protected_size() == 0
    # It was a plain request then, and is a prefix for others.
    assert scheduler.serve(ASKED).cached_tokens == 576


class Waits(LayerDoneCounter):  # type: ignore[misc]
    """SGLang's counter of layers that have come from L2, which notes who waits for which."""

    def __init__(self, layers: int) -> None:
        self.num_layers = layers
        self.waited: list[int] = []

    def wait_until(self, threshold: int) -> None:
        self.waited.append(threshold)


def test_a_batch_ends_after_what_was_brought_from_l2_whether_it_reads_it_or_not(scheduler: Scheduler) -> None:
    """A plan may be given up after its donors were asked for; the next batch has them for a prefix."""
    pool, layers = scheduler.runner.token_to_kv_pool, scheduler.runner.model.model.layers
    pool.layer_transfer_counter = waits = Waits(len(layers))
    try:
        scheduler.serve(prompt(77, 100))
    finally:
        pool.layer_transfer_counter = None
    last = len(layers) - 1
    # Once more than any layer of a plain batch may have waited for itself, and after all of them.
    assert waits.waited.count(last) == waits.waited.count(0) + 1
    assert waits.waited[-1] == last
