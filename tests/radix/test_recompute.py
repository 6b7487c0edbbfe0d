"""Requests whose KV did not arrive: back in the queue as they were, once no batch has them any more."""

from __future__ import annotations

from array import array
from http import HTTPStatus
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    Req,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from polarkv_sglang.accounting import accounting_streamer
from polarkv_sglang.radix.recompute import Recompute


@pytest.fixture(autouse=True)
def _settings() -> None:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))


def a_request() -> Req:
    return Req("a", "", array("q", range(100)), SamplingParams(max_new_tokens=4))


def a_scheduler(**state: object) -> SimpleNamespace:
    """The state of SGLang's scheduler that matters here."""
    idle = {"waiting_queue": ["another"], "chunked_req": None, "_pending_chunked_abort_req": None}
    scheduler = SimpleNamespace(**{**idle, **state})

    def abort_request(wanted: AbortReq) -> None:
        """As SGLang: only what is in the queue."""
        kept = [each for each in scheduler.waiting_queue if isinstance(each, str) or each.rid != wanted.rid]
        scheduler.waiting_queue = kept

    scheduler.abort_request = abort_request
    return scheduler


def end(request: Req) -> None:
    """What SGLang does with a request whose output is to be discarded."""
    request.to_finish = request.discard_output_reason
    request.update_finish_state(0)


def test_it_comes_back_at_the_head_of_the_queue_as_it_was() -> None:
    recompute, request, scheduler = Recompute(), a_request(), a_scheduler()
    request.cached_tokens = request.cached_tokens_storage = 64
    request._cache_breakdown_computed = True
    recompute.mark(request)
    assert request.skip_radix_cache_insert
    end(request)
    assert request.finished()
    assert request.finished_output, "its error would be streamed"
    recompute.revive(scheduler)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == [request, "another"]
    assert not request.finished()
    assert not request.finished_output
    assert not request.skip_radix_cache_insert
    assert request.discard_output_reason is None
    assert list(request.origin_input_ids) == list(range(100))
    assert (request.cached_tokens, request.cached_tokens_storage) == (0, 0)
    assert not request._cache_breakdown_computed


def test_its_images_are_still_there() -> None:
    recompute, request, scheduler = Recompute(), a_request(), a_scheduler()
    pixels = torch.ones(3, 4)
    media = MultimodalInputs([MultimodalDataItem(modality=Modality.IMAGE, feature=pixels)])
    request.multimodal_inputs = media
    recompute.mark(request)
    end(request)
    Scheduler._maybe_clear_mm_inputs(scheduler, SimpleNamespace(reqs=[request]))
    recompute.revive(scheduler)
    assert request.multimodal_inputs is media
    assert media.mm_items[0].feature is pixels


def test_an_embedding_is_not_answered_with_the_error_of_its_load() -> None:
    recompute, lost, arrived = Recompute(), a_request(), Req("b", "", array("q", [1]), SamplingParams())
    recompute.mark(lost)
    end(lost)
    arrived.finished_reason = FINISH_ABORT("here: any reason")
    sent: list[list[str]] = []
    streamer = accounting_streamer(SchedulerOutputStreamer, lambda _: None, lambda _: None)(
        send_to_detokenizer=SimpleNamespace(send_output=lambda output: sent.append(output.rids)),
        tree_cache=None,
        server_args=None,
        is_generation=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        disaggregation_mode=DisaggregationMode.NULL,
        enable_hicache_storage=lambda: False,
    )
    streamer.stream_output([lost, arrived], return_logprob=False)
    assert sent == [["b"]]


def test_tokens_that_an_earlier_chunk_computed_do_not_count_as_cached() -> None:
    """Where a pass is dropped whole, with the second chunk of a prefill in it."""
    recompute, request = Recompute(), a_request()
    scheduler = a_scheduler(chunked_req=request, _pending_chunked_abort_req=request)
    request.cached_tokens = request.cached_tokens_storage = 32
    request._cache_breakdown_computed = True
    request.extend_batch_idx = 2
    recompute.mark(request)
    recompute.take_chunked(scheduler)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == [request, "another"]
    assert (request.cached_tokens, request.cached_tokens_storage) == (32, 32)
    assert request.retracted_stain, "SGLang would count its cached tokens once more"


def test_a_chunked_prefill_is_taken_from_the_scheduler_before_it_is_aborted() -> None:
    recompute, request = Recompute(), a_request()
    scheduler = a_scheduler(chunked_req=request, _pending_chunked_abort_req=request)
    recompute.mark(request)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == ["another"], "its chunk is still the scheduler's"
    recompute.take_chunked(scheduler)
    assert (scheduler.chunked_req, scheduler._pending_chunked_abort_req) == (None, None)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == [request, "another"]


def test_a_chunked_prefill_that_its_client_aborts_is_left_to_sglang() -> None:
    request = a_request()
    scheduler = a_scheduler(chunked_req=request, _pending_chunked_abort_req=request)
    Recompute().take_chunked(scheduler)
    assert scheduler._pending_chunked_abort_req is request


def test_a_request_that_its_client_aborted_meanwhile_ends() -> None:
    recompute, request, scheduler = Recompute(), a_request(), a_scheduler()
    request.to_finish = FINISH_ABORT("Timed out", HTTPStatus.GATEWAY_TIMEOUT)
    recompute.mark(request)
    assert not request.finished_output
    end(request)
    recompute.revive(scheduler)
    assert request.finished()
    assert request.finished_reason.status_code == HTTPStatus.GATEWAY_TIMEOUT
    assert scheduler.waiting_queue == ["another"]


@pytest.mark.parametrize("chunked", [False, True], ids=["ended", "between two chunks"])
@pytest.mark.parametrize(
    ("wanted", "ends"),
    [(AbortReq(rid="a"), True), (AbortReq(abort_all=True), True), (AbortReq(rid="b"), False)],
    ids=["its own", "all", "another's"],
)
def test_an_abort_on_the_way_back_ends_it(wanted: AbortReq, ends: bool, chunked: bool) -> None:
    recompute, request = Recompute(), a_request()
    scheduler = a_scheduler(
        **({"chunked_req": request, "_pending_chunked_abort_req": request} if chunked else {})
    )
    recompute.mark(request)
    if not chunked:
        end(request)
    elif ends:
        request.to_finish = FINISH_ABORT("Aborted")  # by SGLang, which still sees it run
    scheduler.abort_request(wanted)
    recompute.abort(wanted)
    recompute.take_chunked(scheduler)
    recompute.revive(scheduler)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == (["another"] if ends else [request, "another"])
    assert not request.finished_output, "that it was aborted would not be streamed"


def test_one_that_sglang_has_retracted_meanwhile_is_queued_once_and_streamed() -> None:
    recompute, request = Recompute(), a_request()
    scheduler = a_scheduler(chunked_req=request, _pending_chunked_abort_req=request)
    recompute.mark(request)
    request.reset_for_retract()  # as ``pause_generation`` does
    scheduler.waiting_queue.append(request)
    scheduler.chunked_req = None
    recompute.take_chunked(scheduler)
    recompute.revive(scheduler)
    assert scheduler.waiting_queue == ["another", request]
    assert request.discard_output_reason is None, "its output would be dropped"
    assert not request.finished_output
    assert not request.skip_radix_cache_insert
