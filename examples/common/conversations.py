"""Conversations about long real texts: chapters of the reference manual that every Python carries."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer

# With the questions and replies of its turns a conversation comes to about 3,000 tokens.
DOCUMENT_TOKENS = 2850


class Conversation(NamedTuple):
    chapter: str  # a key of pydoc_data.topics
    questions: tuple[str, ...]  # one per turn


CONVERSATIONS = (
    Conversation(
        "compound",
        (
            "What does the else clause of a while loop do?",
            "How does the for statement get its items?",
            "When is the finally clause executed?",
            "What does the break statement do in a loop?",
        ),
    ),
    Conversation(
        "types",
        (
            "What is None used for?",
            "Which kinds of numbers are there?",
            "What is an immutable sequence?",
            "What are mappings?",
        ),
    ),
    Conversation(
        "formatstrings",
        (
            "What does a replacement field look like?",
            "What does the conversion '!r' do?",
            "How is a number aligned to the right?",
            "How is a number shown as a percentage?",
        ),
    ),
    Conversation(
        "string-methods",
        (
            "What does str.capitalize() return?",
            "What is str.casefold() good for?",
            "Which character does str.center() fill with?",
            "How does str.count() count?",
        ),
    ),
    Conversation(
        "debugger",
        (
            "How do I start the debugger?",
            "Which command sets a breakpoint?",
            "How do I print the value of an expression?",
            "How do I leave the debugger?",
        ),
    ),
)


class Session:
    """One user's conversation, as the tokens that SGLang gets.

    Replies are kept as the token ids that were generated: tokenising their text again could cut it otherwise,
    and then nothing after it would be found in any cache.
    """

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        document_tokens: int = DOCUMENT_TOKENS,
        heading: str = "",
    ) -> None:
        """``heading`` comes before everything else: sessions of other headings share no page of tokens."""
        self.name = conversation.chapter
        self.turn = 0  # turns asked so far
        self._questions = conversation.questions
        self._tokenizer = tokenizer
        document = cut(topics[conversation.chapter], tokenizer, document_tokens)
        # The chapter's name comes first: conversations then differ from the first page of tokens on.
        system = f"{heading}'{self.name}' in the Python reference. Answer in one sentence.\n\n{document}"
        self._history = encode(tokenizer, f"<|im_start|>system\n{system}<|im_end|>\n")
        self._prompt: list[int] = []

    def ask(self) -> list[int]:
        """The prompt of the next turn: everything so far and the next question."""
        question = self._questions[self.turn]
        self.turn += 1
        self._history += encode(
            self._tokenizer, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        self._prompt = list(self._history)
        return self._prompt

    def ask_again(self) -> list[int]:
        """The last turn's prompt once more, as to have its reply generated anew; not to be heard again."""
        return self._prompt

    def hear(self, reply_ids: tuple[int, ...]) -> None:
        """Append the model's reply to the last question."""
        end = self._tokenizer.token_to_id("<|im_end|>")
        self._history += [token for token in reply_ids if token != end]
        self._history += encode(self._tokenizer, "<|im_end|>\n")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def cut(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """The leading whole paragraphs of `text` that come to at most `max_tokens` tokens."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        if len(encode(tokenizer, "\n\n".join([*kept, paragraph]))) > max_tokens:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def fresh_prompts(tokenizer: Tokenizer, prompt_tokens: int, seed: int) -> Iterator[list[int]]:
    """Prompts of exactly `prompt_tokens` tokens that share no page with each other or any conversation."""
    used = {conversation.chapter for conversation in CONVERSATIONS}
    ids = encode(tokenizer, "\n\n".join(text for name, text in sorted(topics.items()) if name not in used))
    for count, start in enumerate(range(0, len(ids) - prompt_tokens, prompt_tokens)):
        label = encode(tokenizer, f"Excerpt {seed}.{count} of the Python reference.\n\n")
        yield (label + ids[start : start + prompt_tokens])[:prompt_tokens]
