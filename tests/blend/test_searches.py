"""Requests that wait for donors from the pool: few searches at a time, one agreement per pass."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from polarkv_sglang.blend.index import ChunkIndex, Space
from polarkv_sglang.blend.matches import Matches
from polarkv_sglang.blend.options import Wish
from polarkv_sglang.blend.search import Gap, Search, Wanted
from polarkv_sglang.blend.searches import Searches
from polarkv_sglang.blend.sightings import Naming
from polarkv_sglang.blend.text_finder import MOST_SEARCHES
from polarkv_sglang.radix.giving_way import GivingWay
from tests.blend.test_finder import ASKED, DIGEST, HERE, SEEN, WEIGHTS, WINDOW, Engine, engine, tokens_of
from tests.support import running_node

WISH = Wish(None, None)
Agreement = Callable[[Sequence[int]], list[bool]]


class Request:
    """As much of SGLang's request as a search wants to know."""

    def __init__(self, tokens: list[int]) -> None:
        self.full_untruncated_fill_ids = tokens
        self.prefix_len = self.host_hit_length = 0
        self.extra_key = self.cache_salt = None


class Rank:
    """The searches of one rank over an engine's finder."""

    def __init__(self, running: Engine, agree: Agreement, naming: Naming = HERE) -> None:
        self.running = running
        self.deadline_s = running.client.deadline_s
        self.begun: list[Search] = []
        self.naming = naming
        cache = SimpleNamespace(giving_way=GivingWay())
        matches = Matches(ChunkIndex(WINDOW, 1 << 20))
        self.searches = Searches(cache, matches, self, agree, WINDOW)  # type: ignore[arg-type]

    def search(self, tokens: np.ndarray, _space: Space, gaps: Sequence[Gap]) -> Search:
        self.begun.append(self.running.finder.start(Wanted(tokens, gaps, self.naming, DIGEST, WEIGHTS)))
        return self.begun[-1]

    def pass_over(self, queue: list[Request]) -> list[Request]:
        """Who still waits after a scheduling pass."""
        self.searches.settle()
        return [request for request in queue if self.searches.awaits(request, WISH)]  # type: ignore[arg-type]

    def found(self, request: Request) -> int:
        search = self.searches.over(request, WEIGHTS)  # type: ignore[arg-type]
        return tokens_of(search.found) if search is not None else 0

    def drop(self, request: Request) -> None:
        self.searches.drop(request)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def running() -> Iterator[Engine]:
    with running_node() as node, engine(node.address) as started:
        started.compute(SEEN)
        started.told()
        yield started


def alone(numbers: Sequence[int]) -> list[bool]:
    return [True] * len(numbers)


def test_a_pass_agrees_once_and_begins_few_searches_however_many_wait(running: Engine) -> None:
    agreements: list[int] = []

    def agree(numbers: Sequence[int]) -> list[bool]:
        agreements.append(len(numbers))
        return alone(numbers)

    rank = Rank(running, agree)
    waiting = [Request(ASKED) for _ in range(20)]
    passes = 0
    while waiting:
        before = list(waiting)
        waiting = rank.pass_over(waiting)
        passes += 1
        assert len(agreements) <= passes
        assert sum(not search.settled for search in rank.begun) <= MOST_SEARCHES
        for request in before:
            if request not in waiting:
                assert rank.found(request) > 500
                rank.drop(request)
    assert len(rank.begun) == 20
    assert running.arena.free == running.blocks


def test_who_is_not_served_in_time_goes_on_without(running: Engine) -> None:
    rank = Rank(running, alone)
    queue = [Request(ASKED) for _ in range(MOST_SEARCHES + 1)]
    with running.client._peek_lane.lock:  # no search can get on
        assert rank.pass_over(queue) == queue
        time.sleep(running.client.deadline_s)
        assert queue[-1] not in rank.pass_over(queue)
    while rank.pass_over(queue):
        pass
    assert rank.found(queue[-1]) == 0
    assert len(rank.begun) == MOST_SEARCHES
    for request in queue:
        rank.drop(request)
    assert running.arena.free == running.blocks


def test_ranks_use_what_all_have_found_and_nothing_else(running: Engine) -> None:
    for naming, found in ((HERE, True), (HERE._replace(digest=b"o" * 32), False)):
        told: list[Sequence[int]] = [(), ()]
        meet = threading.Barrier(2, timeout=20)
        outcomes: list[tuple[int, int]] = [(0, 0), (0, 0)]

        def agree(
            number: int,
            numbers: Sequence[int],
            meet: threading.Barrier = meet,
            told: list[Sequence[int]] = told,
        ) -> list[bool]:
            told[number] = numbers
            meet.wait()
            equal = [one == other for one, other in zip(*told, strict=True)]
            meet.wait()
            return equal

        def serve(
            number: int,
            naming: Naming,
            agree: Callable[[int, Sequence[int]], list[bool]] = agree,
            outcomes: list[tuple[int, int]] = outcomes,
        ) -> None:
            rank = Rank(running, lambda numbers: agree(number, numbers), naming)
            request, passes = Request(ASKED), 0
            while rank.pass_over([request]):
                passes += 1
                time.sleep(0.01 * number)
            outcomes[number] = rank.found(request), passes
            rank.drop(request)

        threads = [threading.Thread(target=serve, args=each) for each in ((0, HERE), (1, naming))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][1] > 0
        assert (outcomes[0][0] > 500) is found
        assert running.arena.free == running.blocks


def test_a_request_may_be_collected_while_any_lock_is_held(running: Engine) -> None:
    rank = Rank(running, alone)
    request = Request(ASKED)
    request.itself = request  # type: ignore[attr-defined]
    while rank.pass_over([request]):
        pass
    assert running.arena.free < running.blocks
    del request

    def collect() -> None:
        with running.arena._lock, rank.begun[0]._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    rank.searches.settle()
    assert running.arena.free == running.blocks


def test_a_request_that_cannot_be_read_does_not_wait(running: Engine) -> None:
    request = Request(ASKED)
    del request.prefix_len
    assert Rank(running, alone).pass_over([request]) == []
