from __future__ import annotations

from itertools import combinations, islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from examples.common.conversations import CONVERSATIONS, Session, cut, encode, fresh_prompts
from examples.demo.play import MAX_NEW_TOKENS, PAGE_TOKENS
from examples.smollm2 import prepare
from tests.examples.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def test_cut_keeps_whole_leading_paragraphs(tokenizer):
    assert cut("one\n\ntwo\n\nthree", tokenizer, max_tokens=9) == "one\n\ntwo"
    assert cut("one\n\ntwo\n\nthree", tokenizer, max_tokens=100) == "one\n\ntwo\n\nthree"
    assert cut("one\n\ntwo", tokenizer, max_tokens=2) == ""


def test_a_prompt_continues_the_last_prompt_and_the_reply_as_generated(tokenizer):
    session = Session(CONVERSATIONS[0], tokenizer)
    first = session.ask()
    # Two tokens where encoding their text again could give one.
    reply = (*encode(tokenizer, "ab"), tokenizer.token_to_id("<|im_end|>"))
    session.hear(reply)
    second = session.ask()
    assert second[: len(first) + 2] == [*first, *reply[:2]]
    rest = tokenizer.decode(second[len(first) + 2 :], skip_special_tokens=False)
    assert rest.startswith("<|im_end|>\n<|im_start|>user\n")
    assert rest.endswith("<|im_start|>assistant\n")


def test_a_turn_asked_again_is_the_same_prompt_and_changes_nothing(tokenizer):
    session = Session(CONVERSATIONS[0], tokenizer)
    other = Session(CONVERSATIONS[0], tokenizer)
    reply = tuple(encode(tokenizer, "yes"))
    for one in (session, other):
        first = one.ask()
        one.hear(reply)
    assert session.ask_again() == first
    assert session.ask() == other.ask()


def test_conversations_and_fresh_prompts_share_no_page(tokenizer):
    heads = [tuple(Session(conversation, tokenizer).ask()) for conversation in CONVERSATIONS]
    for seed in (1, 2):
        heads += [tuple(prompt) for prompt in islice(fresh_prompts(tokenizer, 512, seed), 8)]
    first_pages = [head[: 2 * PAGE_TOKENS] for head in heads]
    assert all(one != other for one, other in combinations(first_pages, 2))


def test_fresh_prompts_have_the_length_asked_for(tokenizer):
    assert [len(prompt) for prompt in islice(fresh_prompts(tokenizer, 512, seed=0), 3)] == [512] * 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conversations_come_to_about_3000_tokens(tmp_path: Path):
    real = Tokenizer.from_file(str(prepare(tmp_path / "model") / "tokenizer.json"))
    for conversation in CONVERSATIONS:
        session = Session(conversation, real)
        for _ in conversation.questions:
            prompt = session.ask()
            assert 2500 < len(prompt) < 3200
            session.hear((0,) * MAX_NEW_TOKENS)
