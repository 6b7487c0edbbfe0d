"""The index of chunks: what is found is there, wherever it stands, and it never grows past its limit."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polarkv_sglang.blend.index import ChunkIndex, Match, Space
from polarkv_sglang.blend.rolling import RollingHash

CHUNK = 8
HERE = Space(None, None)


def index(capacity_tokens: int = 1 << 20) -> ChunkIndex:
    return ChunkIndex(CHUNK, capacity_tokens)


def words(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1 << 17) for _ in range(count)]


def others(seed: int, count: int) -> list[int]:
    """Words that are in no list of ``words``."""
    return [1 << 17 | word for word in words(seed, count)]


def found(at: ChunkIndex, tokens: list[int], space: Space = HERE, start: int = 0) -> list[Match]:
    matches = list(at.find(tokens, space, start))
    for match in matches:
        there = match.donor.tokens[match.donor_start : match.donor_end]
        assert there.tolist() == tokens[match.start : match.end]
        assert match.donor.space == space
    return matches


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_windows_have_equal_hashes_where_tokens_are_equal_and_only_there(
    tokens: list[int], window: int
) -> None:
    hashes = RollingHash(window).hashes(np.array(tokens, np.int64)).tolist()
    content = [tuple(tokens[at : at + window]) for at in range(len(tokens) - window + 1)]
    assert len(hashes) == len(content)
    assert len(set(hashes)) == len(set(content))
    assert len(set(zip(hashes, content))) == len(set(content))


def test_hashes_do_not_depend_on_where_a_window_stands() -> None:
    text, long = words(1, 40), words(2, 5000)
    rolling = RollingHash(40)
    (alone,) = rolling.hashes(np.array(text, np.int64)).tolist()
    assert rolling.hashes(np.array(long + text, np.int64)).tolist()[5000] == alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 40), st.integers(0, 40), st.integers(2 * CHUNK, 100))
def test_text_is_found_whole_at_any_offset(seed: int, before: int, elsewhere: int, length: int) -> None:
    document = words(seed, length)
    known = index()
    known.add(words(seed + 1, before) + document + words(seed + 2, 20), HERE)
    asked = others(seed + 3, elsewhere) + document + others(seed + 4, 9)
    (match,) = found(known, asked)
    assert (match.start, match.end) == (elsewhere, elsewhere + length)
    assert match.donor_start == before


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=60), max_size=6), st.lists(st.integers(0, 2), max_size=80)
)
def test_matches_of_repetitive_text_are_true_ascending_and_apart(
    prompts: list[list[int]], asked: list[int]
) -> None:
    known = index(capacity_tokens=100)
    for each in prompts:
        known.add(each, HERE)
        assert known.statistics().tokens <= 100
    matches = found(known, asked)
    for match in matches:
        assert match.end - match.start >= CHUNK
    for one, other in pairwise(matches):
        assert one.end <= other.start


def test_nothing_before_the_start_is_touched() -> None:
    known = index()
    known.add(words(1, 64), HERE)
    (match,) = found(known, words(1, 64), start=20)
    assert (match.start, match.end, match.donor_start) == (20, 64, 20)


def test_tenants_do_not_find_each_other() -> None:
    known = index()
    known.add(words(1, 64), Space("a", None))
    for other in (HERE, Space("b", None), Space("a", "salt")):
        assert found(known, words(1, 64), other) == []
    assert len(found(known, words(1, 64), Space("a", None))) == 1


def test_each_content_is_known_once_where_it_was_added_last() -> None:
    known = index()
    known.add(words(1, 64), HERE)
    known.add(words(2, 16) + words(1, 64), HERE)
    assert known.statistics() == (1, 10, 80)
    (match,) = found(known, words(1, 64))
    assert match.donor_start == 16
    # The same again, or a part of it, changes nothing.
    known.add(words(2, 16) + words(1, 64), HERE)
    known.add((words(2, 16) + words(1, 64))[:40], HERE)
    assert known.statistics() == (1, 10, 80)


def test_what_was_not_used_for_longest_goes_first() -> None:
    known = index(capacity_tokens=200)
    for seed in (1, 2, 3):
        known.add(words(seed, 64), HERE)
    assert len(found(known, words(1, 64))) == 1
    known.add(words(4, 64), HERE)
    assert [len(found(known, words(seed, 64))) for seed in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert known.statistics() == (3, 24, 192)
    known.add(words(5, 201), HERE)
    assert known.statistics().donors == 3, "more than fits at all is not added"


def test_a_donor_that_is_removed_is_not_found() -> None:
    known = index()
    known.add(words(1, 64), HERE)
    (match,) = found(known, words(1, 64))
    known.remove(match.donor)
    known.remove(match.donor)
    assert found(known, words(1, 64)) == []
    assert known.statistics() == (0, 0, 0)
    known.add(words(1, 64), HERE)
    known.clear()
    assert known.statistics() == (0, 0, 0)


def test_as_many_tenants_as_clients_name_are_not_remembered() -> None:
    known = index(capacity_tokens=200)
    for number in range(1000):
        known.add(words(number, 64), Space(None, f"salt {number}"))
        assert len(known._blocks) <= 3
    assert known.statistics() == (3, 24, 192)
    (match,) = found(known, words(999, 64), Space(None, "salt 999"))
    known.remove(match.donor)
    assert len(known._blocks) == 2


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(CHUNK, 2 * CHUNK), st.integers(0, 40), st.integers(0, 40))
def test_short_text_is_found_where_a_block_of_its_donor_lies_in_it(
    seed: int, length: int, before: int, elsewhere: int
) -> None:
    """Which is so for all text of twice a chunk less one token."""
    document = words(seed, length)
    known = index()
    known.add(words(seed + 1, before) + document + words(seed + 2, 20), HERE)
    matches = found(known, others(seed + 3, elsewhere) + document + others(seed + 4, 9))
    first_block = -(-before // CHUNK) * CHUNK
    lies_in_it = first_block + CHUNK <= before + length
    assert [(match.start, match.end) for match in matches] == [(elsewhere, elsewhere + length)] * lies_in_it
    assert lies_in_it or length < 2 * CHUNK - 1


def test_a_change_is_told_wherever_an_answer_may_be_another() -> None:
    known = index()
    seen = [known.changes]
    for change in (
        lambda: known.add(words(1, 64), HERE),
        lambda: known.remove(next(known.find(words(1, 64), HERE)).donor),
        known.clear,
    ):
        change()
        assert known.changes > seen[-1]
        seen.append(known.changes)
