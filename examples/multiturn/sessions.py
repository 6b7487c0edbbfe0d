"""What the sessions say, and when: the same for every system."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from examples.common.conversations import Conversation, Session
from examples.multiturn.presets import Conversations
from polarkv_sglang.errors import ConfigError

CHAPTERS = ("compound", "formatstrings", "debugger", "string-methods", "types")
QUESTIONS = (
    "What is this chapter about?",
    "Which word is explained first?",
    "Give one example from the text.",
    "What should a beginner remember?",
    "Which exception is mentioned?",
    "What does the text warn of?",
    "Which part is the most technical?",
    "What is said about names?",
    "How does the chapter end?",
    "Sum it up in five words.",
)
_LOWEST_TOKEN = 10  # below are special tokens in many vocabularies


class Speaker(Protocol):
    """One session, as the tokens that SGLang gets."""

    def ask(self) -> list[int]:
        """The prompt of the next turn: everything so far and the next question."""
        ...

    def ask_again(self) -> list[int]:
        """The last turn's prompt once more."""
        ...

    def hear(self, reply_ids: tuple[int, ...]) -> None:
        """Append the reply to the last question."""
        ...


class RandomSession:
    """A session of random tokens; no page of it equals one of another seed."""

    def __init__(self, talk: Conversations, seed: str) -> None:
        self._draw = random.Random(seed)
        self._vocabulary = talk.vocabulary
        self._question_tokens = talk.question_tokens
        self._history = self._tokens(talk.history_tokens)
        self._prompt: list[int] = []

    def ask(self) -> list[int]:
        self._history += self._tokens(self._question_tokens)
        self._prompt = list(self._history)
        return self._prompt

    def ask_again(self) -> list[int]:
        return self._prompt

    def hear(self, reply_ids: tuple[int, ...]) -> None:
        self._history += reply_ids

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(_LOWEST_TOKEN, self._vocabulary) for _ in range(count)]


class Turn(NamedTuple):
    """A question that is due; ``timestamp`` is named and counted as SGLang's request generator wants it."""

    timestamp: float  # ms after the begin
    session: int
    round: int


def schedule(talk: Conversations, qps: float, seed: int) -> list[Turn]:
    """Poisson arrivals at ``qps`` requests a second in all, round after round, in an order drawn anew each.

    A session's next turn is not due before its think time has passed since the last one was.
    """
    draw = random.Random(seed)
    turns: list[Turn] = []
    last = dict.fromkeys(range(talk.sessions), float("-inf"))
    now_s = 0.0
    for number in range(talk.rounds):
        for session in draw.sample(range(talk.sessions), talk.sessions):
            now_s += draw.expovariate(qps) if turns else 0.0
            due_s = max(now_s, last[session] + talk.think_s)
            last[session] = due_s
            turns.append(Turn(1000.0 * due_s, session, number))
    return sorted(turns)


def check(talk: Conversations) -> None:
    """Raises ConfigError for more rounds of real text than there are questions."""
    if talk.real_text and talk.rounds > len(QUESTIONS):
        raise ConfigError(f"{talk.rounds} rounds of real text are more than its {len(QUESTIONS)} questions")


def speakers(talk: Conversations, tokenizer: Tokenizer | None, label: str, sessions: int) -> list[Speaker]:
    """``sessions`` sessions; another ``label`` gives others, which share no page with these.

    Raises ConfigError for more rounds of real text than there are questions, or without a tokenizer for it.
    """
    if not talk.real_text:
        return [RandomSession(talk, f"{label}.{number}") for number in range(sessions)]
    check(talk)
    if tokenizer is None:
        raise ConfigError("real text needs a tokenizer.json beside the model; give --model a folder with one")
    return [
        Session(
            Conversation(CHAPTERS[number % len(CHAPTERS)], QUESTIONS[: talk.rounds]),
            tokenizer,
            document_tokens=talk.history_tokens,
            heading=f"Reader {label}.{number}: ",
        )
        for number in range(sessions)
    ]
