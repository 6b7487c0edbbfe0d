"""Requests whose KV did not arrive from the pool, on their way back to the waiting queue."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import MultimodalInputs, Req
    from sglang.srt.managers.scheduler import Scheduler


@dataclass
class _Marked:
    request: Req
    skip_insert: bool  # its skip_radix_cache_insert before it was marked
    first_prefill: bool  # the one that its prompt tokens are attributed at
    media: MultimodalInputs | None  # which SGLang drops for requests that end
    abort: AbortReq | None = None  # that came while it was marked


class Recompute:
    """Sends requests back to be scheduled where SGLang would abort them.

    SGLang (0.5.23, ``managers/scheduler.py``) runs the forward pass of a batch, asks whether its loads
    landed, and ends the requests of those that did not with HTTP 503: it drops what the pass computed for
    them, frees their slots without inserting them, and streams the error. A request that is ``mark``-ed goes
    the same way, except that nothing is streamed and that ``revive`` then treats it as SGLang treats a
    retracted one: at the head of the queue, it is matched and computed again. Its client sees one answer.

    Called by the scheduler thread, alike on all ranks.
    """

    def __init__(self) -> None:
        self._marked: dict[int, _Marked] = {}  # by identity of the request

    def mark(self, request: Req) -> None:
        """Drop what the pass that just ran computed for a request, and have it computed again."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        if request.finished():
            return
        if request.to_finish is None:  # else it ends here, for that reason: its client has aborted it
            first = not request.retracted_stain and not request.output_ids and request.extend_batch_idx < 2
            skip_insert, media = request.skip_radix_cache_insert, request.multimodal_inputs
            self._marked[id(request)] = _Marked(request, skip_insert, first, media)
            request.multimodal_inputs = None
            request.finished_output = True  # as if it had been streamed
        request.skip_radix_cache_insert = True
        request.discard_output_reason = request.to_finish or FINISH_ABORT(
            "KV did not arrive from the pool", HTTPStatus.SERVICE_UNAVAILABLE
        )

    def take_chunked(self, scheduler: Scheduler) -> None:
        """Before SGLang aborts a marked request between two chunks: keep its next chunk from running."""
        request = scheduler._pending_chunked_abort_req
        if request is not None and request is scheduler.chunked_req and id(request) in self._marked:
            scheduler.chunked_req = scheduler._pending_chunked_abort_req = None

    def abort(self, wanted: AbortReq) -> None:
        """Take note of an abort of marked requests, which SGLang does not look for where they are."""
        for marked in self._marked.values():
            if wanted.abort_all or marked.request.rid.startswith(wanted.rid):
                marked.abort = wanted

    def revive(self, scheduler: Scheduler) -> None:
        """Queue the marked requests that no batch refers to any more, and end those that were aborted.

        Called before a prefill batch is chosen: by then SGLang has dropped those that ended from the last
        and the running batch.
        """
        for key, marked in list(self._marked.items()):
            request = marked.request
            if request is scheduler.chunked_req:
                continue
            del self._marked[key]
            if not request.is_retracted:  # since it was marked; SGLang has queued those that are
                _queue_again(scheduler, request)
            _restore(marked)
            if marked.abort is not None:
                scheduler.abort_request(
                    msgspec.structs.replace(marked.abort, rid=request.rid, abort_all=False)
                )


def _queue_again(scheduler: Scheduler, request: Req) -> None:
    from sglang.srt.mem_cache.common import release_kv_cache

    if request.kv.holds_kv:
        release_kv_cache(request, scheduler.tree_cache, checkpoint=False)
    request.finished_reason = request.to_finish = None
    request.reset_for_retract()
    # Not through the scheduler's door: it was let in already, and a queue that is full must not turn it away.
    scheduler.waiting_queue.insert(0, request)
    request.time_stats.set_wait_queue_entry_time()


def _restore(marked: _Marked) -> None:
    """Undo what ``mark`` set and what the dropped pass counted."""
    request = marked.request
    request.discard_output_reason = request.finished_output = None
    request.skip_radix_cache_insert = marked.skip_insert
    request.multimodal_inputs = marked.media
    if marked.first_prefill:
        request.retracted_stain = False
        request._cache_breakdown_computed = False
        request.cached_tokens = 0
        request.cached_tokens_device = request.cached_tokens_host = request.cached_tokens_storage = 0
