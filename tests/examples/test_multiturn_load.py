from __future__ import annotations

import asyncio
import time

import pytest

from examples.common.client import CacheDetails, RequestFailed
from examples.multiturn.load import Answer, Client, Streamed, play
from examples.multiturn.presets import Conversations
from examples.multiturn.sessions import RandomSession, Turn
from tests.examples.streaming import Streaming, streaming, tokens

TALK = Conversations(
    sessions=3, rounds=3, history_tokens=20, question_tokens=4, answer_tokens=2, vocabulary=500
)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Before anything is timed."""
    import sglang.benchmark.serving  # noqa: F401


def ask(url: str, prompt: list[int], max_new_tokens: int = 2) -> Streamed:
    async def once() -> Streamed:
        async with Client(url, timeout_s=5.0) as client:
            return await client.generate(prompt, max_new_tokens)

    return asyncio.run(once())


def played(server: Streaming, turns: list[Turn], think_s: float = 0.0) -> list[Answer]:
    sessions = [RandomSession(TALK, f"test.{number}") for number in range(TALK.sessions)]

    async def all_turns() -> list[Answer]:
        async with Client(server.url) as client:
            return await play(client, sessions, turns, TALK.answer_tokens, think_s=think_s)

    return asyncio.run(all_turns())


def at(second: float, session: int, number: int) -> Turn:
    return Turn(1000.0 * second, session, number)


def test_time_to_first_token_and_the_gaps_between_the_others():
    delay_s = 0.1
    events = [tokens(7), tokens(7, 8), tokens(7, 8, 9, 10)]
    with streaming(lambda _: events, delay_s=delay_s) as server:
        started = time.perf_counter()
        streamed = ask(server.url, [1, 2, 3], 4)
        lasted_s = time.perf_counter() - started
    assert streamed.output_ids == (7, 8, 9, 10)
    assert streamed.prompt_tokens == 3
    assert delay_s <= streamed.ttft_s
    assert streamed.ttft_s + sum(streamed.token_gaps_s) <= lasted_s
    # The last two came together and share the time since the second.
    assert len(streamed.token_gaps_s) == 3
    assert streamed.token_gaps_s[1] == streamed.token_gaps_s[2]
    assert sum(streamed.token_gaps_s) >= 1.5 * delay_s


def test_hits_are_told_by_tier():
    meta = {"cached_tokens": 9, "cached_tokens_details": {"device": 2, "host": 3, "storage": 4}}
    with streaming(lambda _: [tokens(7, **meta)]) as server:
        assert ask(server.url, [1]).hits == CacheDetails(device=2, host=3, storage=4)


def test_polarkvs_own_account_of_the_tiers_is_believed():
    tiers = {"prompt": 9, "l1": 1, "l2": 0, "l3": 6, "l4": 0, "blended": 0, "computed": 2}
    details = {"device": 1, "host": 6}
    with streaming(lambda _: [tokens(7, cached_tokens_details=details, polarkv=tiers)]) as server:
        assert ask(server.url, [1]).hits == CacheDetails(device=1, host=0, storage=6)


def test_greedy_tokens_are_asked_for():
    with streaming(lambda _: [tokens(7)]) as server:
        ask(server.url, [1, 2], 5)
    (body,) = server.bodies
    assert body["stream"] is True
    assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 5, "ignore_eos": False}


@pytest.mark.parametrize(
    "answer", [503, [], [{"error": {"message": "too long"}}]], ids=["HTTP 503", "no token", "error event"]
)
def test_a_failed_request_is_one_kind_of_error(answer):
    with streaming(lambda _: answer) as server, pytest.raises(RequestFailed, match=r"127\.0\.0\.1"):
        ask(server.url, [1])


def test_an_absent_server_is_the_same_kind_of_error():
    with streaming(lambda _: []) as server:
        pass
    with pytest.raises(RequestFailed, match="failed"):
        ask(server.url, [1])


def test_turns_are_sent_when_due_while_others_are_unanswered():
    answer_s, due_s = 1.0, (0.0, 0.2, 0.4)
    with streaming(lambda _: [tokens(7, 8)], delay_s=answer_s) as server:
        answers = played(server, [at(second, session, 0) for session, second in enumerate(due_s)])
    for answer, second in zip(answers, due_s, strict=True):
        assert second - 0.01 <= answer.sent_s < answer_s <= answer.ended_s
    assert server.arrived_s[-1] - server.arrived_s[0] < answer_s


def test_a_session_asks_on_only_after_its_answer_and_its_think_time():
    answer_s, think_s = 0.3, 0.2
    with streaming(lambda _: [tokens(7, 8)], delay_s=answer_s) as server:
        first, second = played(server, [at(0.0, 0, 0), at(0.1, 0, 1)], think_s)
    assert second.sent_s >= first.ended_s + think_s
    assert second.late_s >= answer_s + think_s - 0.15
    assert first.late_s < second.late_s


def test_a_prompt_goes_on_with_the_answer_as_it_was_generated():
    with streaming(lambda _: [tokens(7), tokens(7, 8)]) as server:
        played(server, [at(0.0, 0, 0), at(0.1, 0, 1)])
    first, second = server.prompts
    assert len(first) == TALK.history_tokens + TALK.question_tokens
    assert second[: len(first) + 2] == [*first, 7, 8]
    assert len(second) == len(first) + 2 + TALK.question_tokens


def test_a_failure_is_counted_and_everybody_goes_on():
    failing: list[list[int]] = []

    def answer(prompt: list[int]) -> list[dict[str, object]] | int:
        if not failing:
            failing.append(prompt)
            return 500
        return [tokens(7, 8)]

    with streaming(answer) as server:
        answers = played(server, [at(0.0, 0, 0), at(0.2, 1, 0), at(0.4, 0, 1)])
    assert [answer.streamed is None for answer in answers] == [True, False, False]
    assert "500" in answers[0].error
    assert [answer.error for answer in answers[1:]] == ["", ""]


def test_answers_come_in_the_order_in_which_turns_were_due():
    turns = [at(0.2, 1, 0), at(0.0, 2, 0), at(0.1, 0, 0)]
    with streaming(lambda _: [tokens(7)]) as server:
        answers = played(server, turns)
    assert [answer.session for answer in answers] == [2, 0, 1]
