"""Whose pages are fetched into L2: those of as many requests in the queue as there is room for, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sglang.srt.mem_cache.storage_prefetch import StoragePrefetchRetries

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class _Waiting(NamedTuple):
    """A fetch that was not begun yet."""

    tokens: int
    storage_hit_end: int | None  # SGLang's, passed on


class Fetches(StoragePrefetchRetries):
    """SGLang's list of further attempts to fetch, on which a request may also wait for its first.

    SGLang 0.5.23 begins a fetch when a request arrives, while less than half of L2 is being fetched into.
    Pages that have come do not count in that, so the next request's fetch evicts them before the first is
    admitted, and both are computed in the end. Here they count until their request is admitted, and a fetch
    that finds no room waits for its turn. Where nothing is held any fetch can begin, so a wait ends with the
    admission of those before.

    All ranks make the same calls in the same order.
    """

    def __init__(self, room_tokens: Callable[[], int]) -> None:
        """``room_tokens``: of L2 for requests that are not admitted yet."""
        super().__init__()
        self._room_tokens = room_tokens
        self._held: dict[str, int] = {}  # tokens that were or are fetched for requests in the queue
        self._waiting: dict[str, _Waiting] = {}

    def may_begin(self, rid: str, tokens: int) -> bool:
        """Whether a fetch of so many tokens has room, and nobody waits for it already."""
        return rid in self._held or (not self._waiting and self._has_room(tokens))

    def hold(self, rid: str, tokens: int) -> None:
        """A fetch has begun."""
        self._held[rid] = tokens

    def wait(self, rid: str, tokens: int, storage_hit_end: int | None) -> None:
        """Begin a request's fetch when it is its turn."""
        self._waiting[rid] = _Waiting(tokens, storage_hit_end)

    def is_waiting(self, rid: str) -> bool:
        return rid in self._waiting

    def poll_miss(self, req_id: str, storage_hit_end: int | None = None) -> None:
        self._held.pop(req_id, None)
        super().poll_miss(req_id, storage_hit_end)

    def refetch(self, req_id: str, storage_hit_end: int | None = None) -> None:
        self._held.pop(req_id, None)
        super().refetch(req_id, storage_hit_end)

    def cancel(self, req_id: str) -> None:
        """The request is admitted, or gone, or its fetch is about to begin."""
        self._held.pop(req_id, None)
        self._waiting.pop(req_id, None)
        super().cancel(req_id)

    def clear(self) -> None:
        self._held.clear()
        self._waiting.clear()
        super().clear()

    def pop_ready(
        self, waiting_queue: list[Req], interval: int, max_attempts: int
    ) -> list[tuple[Req, int | None]]:
        if known := self._held.keys() | self._waiting.keys():
            for rid in known - {request.rid for request in waiting_queue}:
                self.cancel(rid)  # it left in a way that tells nobody
        ready: list[tuple[Req, int | None]] = super().pop_ready(waiting_queue, interval, max_attempts)
        for request in waiting_queue if self._waiting else ():
            waiting = self._waiting.get(request.rid)
            if waiting is None:
                continue
            if not self._has_room(waiting.tokens):
                break
            del self._waiting[request.rid]
            self.hold(request.rid, waiting.tokens)
            ready.append((request, waiting.storage_hit_end))
        return ready

    def _has_room(self, tokens: int) -> bool:
        held = sum(self._held.values())
        return not held or held + tokens <= self._room_tokens()
