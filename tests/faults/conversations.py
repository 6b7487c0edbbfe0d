"""Conversations with a real engine whose right answers are known, held by several users at once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import NamedTuple, Self

from examples.common.client import RequestFailed
from tests.engine.servers import Server

VOCABULARY = 512
ANSWER_TOKENS = 8
TURNS = 4
USERS = 4
# Single precision moves a logit by 1e-5 with the shape of a batch: a model that is less sure than this of a
# token may say another, pool or no pool.
_UNDECIDED = 1e-3


class Turn(NamedTuple):
    prompt: tuple[int, ...]  # the conversation so far
    answer: tuple[int, ...]
    seconds: float  # that it took, computed whole, alone


class Answered(NamedTuple):
    """What the engine was asked so far."""

    requests: int
    failed: tuple[str, ...]
    wrong: tuple[str, ...]
    tokens: dict[str, int]  # of prompts, by the tier that they came from
    seconds: tuple[float, ...]  # of each request, in ascending order


def hold(server: Server, conversations: int, seed: int) -> list[Turn]:
    """Hold conversations once, each turn computed from its first token on, and keep the answers.

    Turns of which the model is undecided are left out: what follows them, too.
    """
    rng = random.Random(f"{seed} conversations")
    turns = []
    for _ in range(conversations):
        history: list[int] = []
        for _ in range(TURNS):
            history += [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(60, 160))]
            server.flush()
            started = time.monotonic()
            reply = server.post(
                "/generate",
                input_ids=history,
                sampling_params={"temperature": 0, "max_new_tokens": ANSWER_TOKENS},
                return_logprob=True,
                top_logprobs_num=2,
            )
            meta = reply["meta_info"]
            assert isinstance(meta, dict)
            assert meta["polarkv"]["computed"] == len(history), "a reference came from a cache"
            if any(first[0] - second[0] < _UNDECIDED for first, second in meta["output_top_logprobs"]):
                break
            answer = reply["output_ids"]
            assert isinstance(answer, list)
            turns.append(Turn(tuple(history), tuple(answer), time.monotonic() - started))
            history += answer
    return turns


class Users:
    """Threads that take random turns of known conversations, and compare the answers token by token."""

    def __init__(self, server: Server, turns: list[Turn], seed: int, pause_s: float) -> None:
        """``pause_s`` is the mean time that a user thinks."""
        self._server = server
        self._turns = turns
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._paused = False
        self._busy = 0
        self._failed: list[str] = []
        self._wrong: list[str] = []
        self._tokens: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._threads = [
            threading.Thread(target=self._converse, args=(random.Random(f"{seed} user {user}"),))
            for user in range(USERS)
        ]
        for thread in self._threads:
            thread.start()

    def answered(self) -> Answered:
        """All requests that have ended."""
        with self._changed:
            return Answered(
                len(self._seconds) + len(self._failed),
                tuple(self._failed),
                tuple(self._wrong),
                dict(self._tokens),
                tuple(sorted(self._seconds)),
            )

    def pause(self) -> None:
        """Ask nothing from here on; returns when all requests have ended."""
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._busy)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def stop(self) -> Answered:
        """End the threads once their requests have ended."""
        self._stopping.set()
        self.resume()
        for thread in self._threads:
            thread.join()
        return self.answered()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _converse(self, rng: random.Random) -> None:
        while not self._stopping.wait(rng.uniform(0, 2 * self._pause_s)):
            turn = rng.choice(self._turns)
            with self._changed:
                self._changed.wait_for(lambda: not self._paused)
                self._busy += 1
            self._ask(turn)
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _ask(self, turn: Turn) -> None:
        started = time.monotonic()
        try:
            reply = self._server.generate(list(turn.prompt), max_new_tokens=ANSWER_TOKENS)
        except (RequestFailed, AssertionError) as error:
            with self._changed:
                self._failed.append(f"{type(error).__name__}: {error}")
            return
        with self._changed:
            self._seconds.append(time.monotonic() - started)
            assert reply.tiers is not None
            for tier in ("l1", "l2", "l3", "computed"):
                self._tokens[tier] += getattr(reply.tiers, tier)
            if reply.output_ids != turn.answer:
                self._wrong.append(f"{reply.output_ids} instead of {turn.answer}, with {reply.tiers}")
