"""What a scheduler promises that blends, around a real model; run by test_passes.py in its process."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import msgspec
import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from polarkv_sglang.blend.matches import MOST_MATCHES
from polarkv_sglang.blend.options import Wish
from polarkv_sglang.blend.start import start_blending
from polarkv_sglang.cli import main
from tests.blend.fixtures import ASKED, ONE, QUESTION, RATIOS, REUSED, SEEN, TAIL
from tests.blend.scheduler import CONFIG, Scheduler
from tests.engine.servers import prompt


@pytest.mark.parametrize("chunk", [1 << 20, 128])
def test_a_request_after_a_blended_one_gets_exact_kv_only(scheduler: Scheduler, chunk: int) -> None:
    scheduler.serve(SEEN)
    before = scheduler.blender.index.statistics()
    for ratio in (0.0, 0.15, 1.0):
        blended = scheduler.serve(ASKED, chunk=chunk, polarkv_blend=True, polarkv_blend_ratio=ratio)
        assert sum(blended.counts) > REUSED - 32
    assert scheduler.blender.index.statistics() == before
    after = scheduler.serve(ASKED, chunk=chunk)
    assert after.cached_tokens == 0
    assert after.counts == (0, 0)
    again = scheduler.serve(ASKED)
    assert again.cached_tokens == (len(ASKED) - 1) // 16 * 16
    assert (again.logits - after.logits).abs().max() < 1e-4 * after.logits.abs().max()


def test_a_blended_request_that_was_retracted_comes_back_exact_and_private(scheduler: Scheduler) -> None:
    expected = scheduler.serve([*ASKED, 5])
    scheduler.forget()
    scheduler.serve(SEEN)
    known = scheduler.blender.index.statistics()
    request = scheduler.request(ASKED, polarkv_blend=True, polarkv_blend_ratio=0)
    request.init_next_round_input(scheduler.cache)
    scheduler.adder().add_one_req(request, has_chunked_req=False, truncation_align_size=None)
    scheduler._compute(request)
    assert scheduler.blender.counts(request).blended > 0
    request.output_ids.append(5)
    scheduler.blender.see_batch([request])
    request.kv.kv_committed_len = len(ASKED)
    release_kv_cache(request, scheduler.cache, checkpoint=False)
    request.reset_for_retract()
    blended = scheduler.blender.counts(request)
    resumed = scheduler.serve_request(request)
    assert resumed.counts == blended, "it was blended again"
    assert (resumed.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()
    assert matched(scheduler, ASKED) == 0
    assert scheduler.blender.index.statistics() == known
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    assert scheduler.allocator.available_size() == scheduler.allocator.size


def test_slots_and_locks_are_given_back(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    free = scheduler.allocator.available_size()
    scheduler.serve(ASKED, polarkv_blend=True)
    scheduler.serve(ASKED, chunk=128, polarkv_blend=True)
    assert scheduler.allocator.available_size() == free
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    assert scheduler.allocator.available_size() == scheduler.allocator.size


def test_donors_are_locked_until_the_prompt_is_computed(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    request = scheduler.request(ASKED, polarkv_blend=True)
    request.init_next_round_input(scheduler.cache)
    adder = scheduler.adder()
    adder.add_one_req(request, has_chunked_req=False, truncation_align_size=None)
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    assert matched(scheduler, SEEN) == 576
    scheduler._compute(request)
    # It is aborted in between; whatever it held is given back.
    request.finished_reason = FINISH_ABORT("test")
    release_kv_cache(request, scheduler.cache, checkpoint=True)
    scheduler.cache.evict(EvictParams(num_tokens=1 << 14))
    assert scheduler.allocator.available_size() == scheduler.allocator.size


def matched(scheduler: Scheduler, tokens: list[int]) -> int:
    key = RadixKey(array("q", tokens))
    return int(scheduler.cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)


def test_blended_and_plain_requests_take_turns(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    plain, blended = scheduler.request(prompt(7, 100)), scheduler.request(ASKED, polarkv_blend=True)
    for request in (plain, blended):
        request.init_next_round_input(scheduler.cache)

    def add(adder, request) -> AddReqResult:  # type: ignore[no-untyped-def]
        return adder.add_one_req(request, has_chunked_req=False, truncation_align_size=None)

    first = scheduler.adder()
    assert add(first, plain) is AddReqResult.CONTINUE
    assert add(first, blended) is AddReqResult.OTHER
    assert not scheduler.blender.is_blended(blended)
    second = scheduler.adder()
    assert add(second, blended) is AddReqResult.CONTINUE
    assert add(second, scheduler.request(prompt(8, 50))) is AddReqResult.OTHER
    assert (first.can_run_list, second.can_run_list) == ([plain], [blended])


def test_neither_kind_starves_and_the_queue_keeps_its_order(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    queue = [
        scheduler.request([50 + at, *ASKED], polarkv_blend=True)
        if at % 2
        else scheduler.request(prompt(at, 40))
        for at in range(20)
    ]
    order, passes = [request.rid for request in queue], 0
    admitted: list[str] = []
    while queue:
        passes += 1
        adder = scheduler.adder()
        for request in queue:
            request.init_next_round_input(scheduler.cache)
            result = adder.add_one_req(request, has_chunked_req=False, truncation_align_size=None)
            if result is not AddReqResult.CONTINUE:
                break
        blended = [request for request in adder.can_run_list if scheduler.blender.is_blended(request)]
        assert not blended or adder.can_run_list == blended[:1]
        for request in adder.can_run_list:
            served = scheduler.compute(request)
            assert (served.counts.blended > 0) is (request in blended)
            queue.remove(request)
            admitted.append(request.rid)
        assert passes <= 20
    assert admitted == order


def test_an_exact_prefix_may_end_in_the_middle_of_a_document(scheduler: Scheduler) -> None:
    expected = scheduler.serve(ASKED)
    scheduler.forget()
    scheduler.serve(SEEN)
    scheduler.serve(ASKED[:64])
    served = scheduler.serve(ASKED, polarkv_blend=True, polarkv_blend_ratio=1.0)
    assert served.cached_tokens == 64
    assert sum(served.counts) > REUSED - (64 - 11) - 32
    assert (served.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()
    assert served.logits.argmax() == expected.logits.argmax()


def test_a_request_that_waits_is_planned_once_until_something_changes(scheduler: Scheduler) -> None:
    hopeless, blended = (scheduler.request(ASKED, polarkv_blend=True) for _ in range(2))
    hopeless.init_next_round_input(scheduler.cache)
    for _ in range(5):
        assert not scheduler.blender.plan(hopeless)
    assert scheduler.blender.plans == 1
    scheduler.serve(SEEN)
    assert scheduler.blender.plan(hopeless)
    scheduler.blender.release(hopeless)
    before = scheduler.blender.plans
    for seed in range(20, 25):  # behind others, it waits for a batch of its own
        adder = scheduler.adder()
        for request in (scheduler.request(prompt(seed, 50)), blended):
            request.init_next_round_input(scheduler.cache)
            adder.add_one_req(request, has_chunked_req=False, truncation_align_size=None)
        assert blended not in adder.can_run_list
    assert scheduler.blender.plans == before
    assert scheduler.serve_request(blended).counts.blended > 0
    assert scheduler.blender.plans == before + 1


def test_locked_donors_that_leave_no_room_are_done_without(scheduler: Scheduler) -> None:
    """Otherwise a request that only fits without its donors would wait for ever."""
    scheduler.serve(SEEN)
    room = scheduler.allocator.size
    asked = ASKED[:-TAIL] + prompt(6, room - len(ASKED) - 200)
    served = scheduler.serve(asked, polarkv_blend=True)
    assert served.counts == (0, 0)


@pytest.mark.parametrize(
    "custom",
    [
        {},
        {"polarkv_blend": False},
        {"polarkv_blend": "yes"},
        {"polarkv_blend": True, "polarkv_blend_ratio": 2},
        {"polarkv_blend": True, "polarkv_blend_spans": [5, 2]},
        {"polarkv_blend": True, "polarkv_blend_spans": [0, 11]},
        {"polarkv_blend": True, "polarkv_blend_spans": [0, 578] + [578] * 3000},
    ],
    ids=lambda custom: str(custom)[:60],
)
def test_who_does_not_ask_rightly_is_computed_in_full(
    scheduler: Scheduler, custom: dict[str, object]
) -> None:
    scheduler.serve(SEEN)
    assert scheduler.serve(ASKED, **custom).counts == (0, 0)


def test_blended_passes_are_told_from_those_that_show_the_speed_of_prefill(scheduler: Scheduler) -> None:
    """Also where the answer is one token, so that the request has left when its batch is seen."""
    for tokens, custom, blended in ((SEEN, {}, False), (ASKED, {"polarkv_blend": True}, True)):
        request = scheduler.request(tokens, **custom)
        scheduler.serve_request(request)
        assert scheduler.blender.see_batch([request]) is blended


def test_spans_limit_what_is_reused(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    served = scheduler.serve(
        ASKED, polarkv_blend=True, polarkv_blend_spans=[100, 180, 300, 301], polarkv_blend_ratio=0
    )
    assert served.counts == (81, 0)


def test_of_many_matches_the_longest_are_used_and_looked_up_once(scheduler: Scheduler) -> None:
    """Each is a walk down the tree in the scheduler's thread."""
    short = [prompt(300 + at, 33) for at in range(MOST_MATCHES + 10)]
    for at in range(0, len(short), 10):
        scheduler.serve([token for text in short[at : at + 10] for token in [*text, 7]])
    scheduler.serve(ONE)
    asked = [token for text in [*short, ONE[:288]] for token in [*text, 9]] + QUESTION
    request = scheduler.request(asked, polarkv_blend=True)
    request.init_next_round_input(scheduler.cache)
    matches = scheduler.blender._matches
    found = matches.of(request, Wish(None, None))
    assert len(found) <= MOST_MATCHES
    assert max(match.end - match.start for match in found) >= 288
    assert matches.of(request, Wish(None, None)) is found
    scheduler.serve(prompt(600, 64))
    assert matches.of(request, Wish(None, None)) is not found


def test_salts_and_extra_keys_keep_their_text_to_themselves(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    for field in ("cache_salt", "extra_key"):
        request = scheduler.request(ASKED, polarkv_blend=True)
        setattr(request, field, "another tenant")
        request.init_next_round_input(scheduler.cache)
        assert not scheduler.blender.plan(request)


def test_prompt_logprobs_sessions_and_retracted_requests_are_computed_in_full(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    changes: list[dict[str, object]] = [
        {"return_logprob": True, "logprob_start_len": 0},
        {"return_hidden_states": True},
        {"session": object()},
        {"lora_id": "adapter"},
        {"retraction_count": 1},
    ]
    for change in changes:
        request = scheduler.request(ASKED, polarkv_blend=True)
        request.init_next_round_input(scheduler.cache)
        for name, value in change.items():
            setattr(request, name, value)
        assert not scheduler.blender.plan(request), change
    request = scheduler.request(ASKED, polarkv_blend=True)
    request.init_next_round_input(scheduler.cache)
    assert scheduler.blender.plan(request)
    scheduler.blender.release(request)


def test_a_request_that_cannot_be_read_is_computed_in_full(scheduler: Scheduler) -> None:
    scheduler.serve(SEEN)
    request = scheduler.request(ASKED, polarkv_blend=True)
    del request.beam_group
    request.init_next_round_input(scheduler.cache)
    assert not scheduler.blender.plan(request)


# The gate, and what it wants; last, since it makes a model of its own


def test_a_model_is_blended_once_it_has_passed_its_check(
    scheduler: Scheduler,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    verdicts = tmp_path / "verdicts"
    gated = msgspec.structs.replace(CONFIG, blend_gate="verdict", blend_verdicts=str(verdicts))

    def starts(**change: object) -> bool:
        scheduler.cache.blender = None
        scheduler.cache.runtime.config = msgspec.structs.replace(gated, **change)
        start_blending(scheduler.cache, scheduler.runner)
        return scheduler.cache.blender is not None

    assert not starts()
    runner = scheduler.runner
    model = str(runner.server_args.model_path)
    check = ["blend-check", model, "--tokens", "500", "--prompts", "1", "--dtype", "float32", "--json"]
    assert main([*check, "--verdicts", str(verdicts)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ratio"] for row in rows] == list(RATIOS)
    names = ["ratio", "layer_tokens", "k_error", "v_error", "kl", "top1_agreement", "cpu_speedup"]
    assert all(list(row) == names for row in rows)
    assert rows[0]["v_error"] > 0.05 > rows[-1]["v_error"]
    assert rows[-1]["top1_agreement"] == 1.0
    assert starts()
    # What was checked is how rows are chosen, too.
    for change in ({"blend_strategy": "first"}, {"blend_metric": "k"}, {"blend_stages": "2:0.1"}):
        assert not starts(**change)
    # The log says how to check that.
    assert (
        f"blend-check {model} --dtype float32 --stages 2:0.1 --verdicts {verdicts} (or" in caplog.messages[-1]
    )
    assert starts(blend_ratio=0.3)
    assert_only_checked_weights_are_blended(scheduler)
    # A verdict that says no, or says nothing, or is of another version.
    (path,) = verdicts.iterdir()
    passed = json.loads(path.read_text())
    for broken in (
        json.dumps({**passed, "passed": False, "reasons": ["keys are off"]}),
        json.dumps({**passed, "sglang": "0.5.22"}),
        "{",
    ):
        path.write_text(broken)
        assert not starts()


def assert_only_checked_weights_are_blended(scheduler: Scheduler) -> None:
    assert scheduler.cache.blender is not None
    scheduler.blender = scheduler.cache.blender
    guard, embedding = scheduler.cache.runtime.weights, scheduler.runner.model.model.embed_tokens.weight
    checked = embedding.data[5].clone()
    for row, blends in ((checked, True), (checked + 1, False), (checked, True)):
        guard.suspend()
        embedding.data[5] = row
        guard.name()
        scheduler.forget()
        scheduler.serve(SEEN)
        assert (scheduler.serve(ASKED, polarkv_blend=True).counts.blended > 0) is blends
    scheduler.forget()
