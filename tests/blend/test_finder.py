"""Text that one engine computed is found in the pool by another, at any offset, and never another text."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from polarkv_sglang.blend import publisher, text_finder
from polarkv_sglang.blend.arena import Arena
from polarkv_sglang.blend.publisher import Publisher
from polarkv_sglang.blend.rolling import RollingHash
from polarkv_sglang.blend.search import Arrived, Gap, Search, Wanted
from polarkv_sglang.blend.sightings import Naming, decode_note, encode_note, landmarks, note_key, sightings
from polarkv_sglang.blend.text_finder import TextFinder
from polarkv_sglang.identity import block_keys
from polarkv_sglang.pool.blocks import Chain, Pieces, chain
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.weights import WeightsIdentity
from tests.engine.servers import prompt
from tests.pool.rank import DEADLINE_S, flip_a_byte
from tests.support import RunningNode, running_node, running_nodes

PAGE, WINDOW, STRIPE, BLOCK_BYTES = 4, 8, 8, 4096
DIGEST = bytes(range(32))
WEIGHTS = WeightsIdentity("weights", "config")
HERE = Naming(b"n" * 32, "", WINDOW)
HEAD, ONE, TWO, QUESTION = prompt(3, 37), prompt(1, 300), prompt(2, 250), prompt(4, 20)
SEEN, ASKED = HEAD + ONE + TWO, HEAD[:11] + TWO + ONE[3:] + QUESTION


class Page(NamedTuple):
    tokens: list[int]
    number: int  # in its prompt


PAGES: dict[str, Page] = {}  # all that were computed, by page hash


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def hash_pages(tokens: np.ndarray, seed: str) -> list[str]:
    names, before = [], bytes.fromhex(seed)
    for at in range(0, len(tokens) // PAGE * PAGE, PAGE):
        before = hashlib.sha256(before + tokens[at : at + PAGE].astype("<u4").tobytes()).digest()
        names.append(before.hex())
    return names


class Engine:
    """As much of an engine as shares donors: its blocks hold their page's hash."""

    def __init__(self, *nodes: str, blocks: int = 1024) -> None:
        self.client = PoolClient(nodes, deadline_s=DEADLINE_S, client="test engine")
        assert self.client.membership.wait_tried(10)
        self.memory = np.zeros((1024, BLOCK_BYTES), np.uint8)
        self.client.register(self.memory.ctypes.data, self.memory.nbytes)
        self.arena = Arena(self.client, BLOCK_BYTES, blocks * BLOCK_BYTES, torch.device("cpu"))
        self.blocks = blocks
        self.publisher = Publisher(self.client, hash_pages, page_tokens=PAGE, stripe_pages=STRIPE)
        self.finder = TextFinder(
            self.client, self.arena, hash_pages, page_tokens=PAGE, stripe_pages=STRIPE, least_tokens=WINDOW
        )

    def compute(self, tokens: list[int], naming: Naming = HERE, *, puts: int | None = None) -> list[bytes]:
        """Put a prompt's pages, or the first ``puts``, and tell of them; the keys of all."""
        names = hash_pages(array(tokens), naming.seed)
        for number, name in enumerate(names):
            PAGES[name] = Page(tokens[number * PAGE : number * PAGE + PAGE], number)
            self.memory[number] = np.frombuffer(bytes.fromhex(name) * (BLOCK_BYTES // 32), np.uint8)
        keys = block_keys(DIGEST, names)
        start, some = np.uint64(self.memory.ctypes.data), keys[:puts]
        addresses = start + np.arange(len(some), dtype=np.uint64)[:, None] * np.uint64(BLOCK_BYTES)
        assert self.client.put(chain([], some, STRIPE), Pieces(addresses, BLOCK_BYTES)).all()
        self.publisher.learn(naming, array(tokens))
        self.publisher.stored(names)
        return keys

    def told(self) -> None:
        """Once what was told is in the pool: the thread has done what came before this."""
        while self.publisher._events.qsize() or self.client.read_notes([b"the last note is"]) == [b""]:
            self.client.write_notes({b"the last note is": b"written"})
            time.sleep(0.02)

    def search(self, tokens: list[int], *gaps: Gap, naming: Naming = HERE) -> Search:
        everything = (Gap(0, len(tokens) - 1),)
        search = self.finder.start(Wanted(array(tokens), gaps or everything, naming, DIGEST, WEIGHTS))
        while not search.settled:
            time.sleep(0.002)
        search.freeze()
        return search

    def find(self, tokens: list[int], *gaps: Gap, naming: Naming = HERE) -> list[Arrived]:
        """What is found, once every token of it was compared with what its block was computed of."""
        search = self.search(tokens, *gaps, naming=naming)
        found = list(search.found)
        end = 0
        for each in found:
            assert each.start >= end
            end = each.end
            for at in range(each.start, each.end):
                number, offset = divmod(each.old_start + at - each.start, PAGE)
                block = self.arena.blocks[each.rows[number - each.first_page]].numpy()
                name = block[:32].tobytes().hex()
                assert block.tobytes() == bytes.fromhex(name) * (BLOCK_BYTES // 32)
                assert PAGES[name].number == number
                assert PAGES[name].tokens[offset] == tokens[at]
        search.close()
        assert self.arena.free == self.blocks
        return found


@contextlib.contextmanager
def engine(*nodes: str, blocks: int = 1024) -> Iterator[Engine]:
    running = Engine(*nodes, blocks=blocks)
    try:
        yield running
    finally:
        running.finder.close()
        running.publisher.close()
        running.client.close()


def tokens_of(found: list[Arrived]) -> int:
    return sum(each.end - each.start for each in found)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[RunningNode]]:
    with running_nodes(2) as nodes:
        yield nodes


@pytest.fixture
def pair(nodes: list[RunningNode]) -> Iterator[tuple[Engine, Engine]]:
    addresses = [node.address for node in nodes]
    with engine(*addresses) as writer, engine(*addresses) as reader:
        yield writer, reader


def test_another_engine_finds_documents_whole_in_another_order(pair: tuple[Engine, Engine]) -> None:
    writer, reader = pair
    writer.compute(SEEN)
    writer.told()
    found = reader.find(ASKED)
    # But for what its last page, which is not whole, has of it.
    assert tokens_of(found) >= len(TWO) + len(ONE) - 3 - len(SEEN) % PAGE
    (part,) = reader.find(ASKED, Gap(100, 200))
    assert (part.start, part.end, part.old_start) == (100, 200, found[0].old_start + 100 - found[0].start)


def test_the_lane_of_exact_prefixes_is_held_for_few_blocks_at_a_time(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_finder, "_BYTES_AT_ONCE", 10 * BLOCK_BYTES)
    writer, reader = pair
    writer.compute(SEEN)
    writer.told()
    reads: list[int] = []
    get = reader.client.get

    def counted(chain: Chain, *more: Pieces) -> np.ndarray:
        reads.append(len(chain))
        return get(chain, *more)

    monkeypatch.setattr(reader.client, "get", counted)
    assert tokens_of(reader.find(ASKED)) >= len(TWO) + len(ONE) - 3 - len(SEEN) % PAGE
    assert max(reads) == 10
    assert len(reads) > len(SEEN) / PAGE / 10


def test_what_is_found_is_never_another_text(pair: tuple[Engine, Engine]) -> None:
    """Prompts that begin alike, go different ways, and meet again."""
    writer, reader = pair
    draw = random.Random(5)
    texts = [prompt(100 + number, draw.randrange(40, 200)) for number in range(6)]
    for _ in range(12):
        seen = [token for text in draw.choices(texts, k=4) for token in text[: draw.randrange(30, 201)]]
        writer.compute(seen)
    writer.told()
    found = 0
    for _ in range(30):
        asked = [token for text in draw.choices(texts, k=5) for token in text[draw.randrange(20) :]]
        asked[draw.randrange(len(asked))] = 7
        found += tokens_of(reader.find(asked))
    assert found > 5000


def test_other_tenants_and_namespaces_find_nothing(pair: tuple[Engine, Engine]) -> None:
    writer, reader = pair
    mine = HERE._replace(seed=hashlib.sha256(b"mine").hexdigest())
    text = prompt(200, 400)
    writer.compute(text, mine)
    writer.told()
    asked = text[30:] + QUESTION
    assert tokens_of(reader.find(asked, naming=mine)) > 350
    for other in (HERE, HERE._replace(seed=hashlib.sha256(b"theirs").hexdigest())):
        assert reader.find(asked, naming=other) == []
    assert reader.find(asked, naming=mine._replace(digest=b"o" * 32)) == []


def test_blocks_that_are_gone_or_corrupt_are_not_found(
    pair: tuple[Engine, Engine], nodes: tuple[RunningNode, RunningNode]
) -> None:
    writer, reader = pair
    gone, corrupt = prompt(300, 400), prompt(301, 400)
    writer.compute(gone, puts=40)
    keys = writer.compute(corrupt)
    writer.told()
    assert tokens_of(reader.find(gone[8:] + QUESTION)) == 160 - 8
    for node in nodes:
        with contextlib.suppress(OSError):
            flip_a_byte(node, keys[50])
    assert tokens_of(reader.find(corrupt[8:] + QUESTION)) == 200 - 8


def test_text_is_found_again_where_it_was_computed_last(pair: tuple[Engine, Engine]) -> None:
    """Its first blocks are gone, though the notes that tell of them are not."""
    writer, reader = pair
    text = prompt(400, 400)
    writer.compute(prompt(401, 21) + text, puts=0)
    writer.told()
    assert reader.find(text + QUESTION) == []
    reader.compute(prompt(402, 10) + text)
    reader.told()
    assert tokens_of(writer.find(text + QUESTION)) > 390


def test_notes_that_are_not_what_was_written_are_none(pair: tuple[Engine, Engine]) -> None:
    writer, reader = pair
    text = array(prompt(500, 400))
    rolling = RollingHash(WINDOW)
    written = list(sightings(HERE, rolling, text, hash_pages(text, ""), PAGE, STRIPE))
    assert [each.key for each in written] == [
        note_key(HERE, text[at : at + WINDOW]) for at in landmarks(rolling, text)
    ]
    draw = random.Random(1)
    for each in written:
        broken = bytearray(each.note)
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        assert decode_note(each.key, bytes(broken), "", PAGE) is None
        assert decode_note(bytes(16), each.note, "", PAGE) is None
        sighting = decode_note(each.key, each.note, "", PAGE)
        assert sighting is not None
        assert decode_note(each.key, encode_note(each.key, sighting), "", 1000) is None
        # Where a prompt begins is bound by the names of its pages.
        for start, before in ((0, "0" * 64), (PAGE, "")):
            moved = encode_note(each.key, msgspec.structs.replace(sighting, start=start, before=before))
            assert decode_note(each.key, moved, "", PAGE) is None
    writer.client.write_notes({each.key: b"garbage" for each in written})
    writer.told()
    assert reader.find(text.tolist()) == []


def test_prompts_that_wait_to_be_told_of_have_a_limit_in_tokens(
    pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand long ones would be a gigabyte."""
    monkeypatch.setattr(publisher, "_MOST_TOKENS", 1000)
    told, hold = [], threading.Event()

    def slowly(tokens: np.ndarray, seed: str) -> list[str]:
        told.append(len(tokens))
        hold.wait(20)
        return hash_pages(tokens, seed)

    slow = Publisher(pair[0].client, slowly, page_tokens=PAGE, stripe_pages=STRIPE)
    slow.learn(HERE, array(prompt(800, 900)))
    while not told:  # it waits no more
        time.sleep(0.002)
    for seed in range(801, 811):
        slow.learn(HERE, array(prompt(seed, 300)))
    hold.set()
    slow.close()
    assert told == [900, 300, 300, 300]
    assert slow._waiting_tokens == 0


def test_what_does_not_fit_is_left_out(nodes: tuple[RunningNode, RunningNode]) -> None:
    address = nodes[0].address
    with engine(address) as writer, engine(address, blocks=30) as reader:
        writer.compute(prompt(600, 400))
        writer.told()
        asked = prompt(600, 400)[5:] + QUESTION
        assert 100 <= tokens_of(reader.find(asked)) <= 120
        held = reader.search(asked)
        assert reader.arena.free == 0
        assert reader.search(asked).found == []
        held.close()
        assert reader.arena.free == 30


def test_a_search_ends_in_time_when_memory_nodes_are_frozen_or_dead() -> None:
    with running_node() as doomed, engine(doomed.address) as reader:
        reader.compute(prompt(700, 400))
        reader.told()
        doomed.kill()
        for _ in range(2):
            started = time.monotonic()
            assert reader.find(prompt(700, 400)) == []
            assert time.monotonic() - started < 4 * DEADLINE_S
        abandoned = reader.finder.start(Wanted(array(ASKED), [Gap(0, 500)], HERE, DIGEST, WEIGHTS))
        abandoned.close()
        assert abandoned.found == []
