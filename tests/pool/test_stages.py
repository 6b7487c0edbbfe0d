"""Blocks that are read part by part: what is told of before the answer, and what the answer is for."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from polarkv_sglang.pool.blocks import Pieces, Stages
from polarkv_sglang.pool.placement import ranking
from polarkv_sglang.transport.messages import MAX_PULL_PARTS, Locate, Peek, Release, ReportCorrupt
from tests.faults.nodes import FaultyNode
from tests.pool.rank import PIECE_BYTES, STRIPE_PAGES, Rank, a_rank, flip_a_byte, prompt, wait_until_live
from tests.pool.test_copies import a_pool, wait_until_held
from tests.support import RunningNode, running_node, running_nodes

PAGES = STRIPE_PAGES
BLOCK_BYTES = 2 * PIECE_BYTES
PIECES = [[slice(0, 1)], [slice(1, 2)]]  # a stage for each piece of a block
QUARTERS = [[slice(number, number + 1)] for number in range(4)]


def get(rank: Rank, name: str, pages: int = PAGES) -> tuple[list[bool], list[tuple[int, list[bool]]]]:
    """The answer, and at each arrival its number and which pieces of all blocks were there."""
    blocks, seen = prompt(name, pages), []
    rank.memory[:, :pages] = 0

    def arrived(number: int) -> None:
        seen.append((number, [bool(piece.any()) for piece in rank.memory[:, :pages]]))

    right = rank.client.get(blocks, rank.pieces(pages), Stages(PIECES, arrived))
    return right.tolist(), seen


@pytest.mark.parametrize("tls", [None, "cma,tcp", "tcp"], ids=["mapped", "cma", "tcp"])
def test_parts_arrive_in_order_and_make_whole_blocks(tls: str | None) -> None:
    with running_node() as node, a_rank(node.address, ucx_tls=tls) as rank:
        before = rank.memory.copy()
        assert all(rank.put(prompt("a", PAGES)))
        right, seen = get(rank, "a")
        assert right == [True] * PAGES
        # Over tcp the node may be putting the second part by then.
        assert [(number, pieces[: number + 1]) for number, pieces in seen] == [(0, [True]), (1, [True, True])]
        assert tls == "tcp" or seen[0][1] == [True, False]
        assert (rank.memory[:, :PAGES] == before[:, :PAGES]).all()


def test_parts_that_several_nodes_put_arrive_when_all_have() -> None:
    pages = 16 * STRIPE_PAGES
    with (
        running_nodes(2) as (one, two),
        a_rank(one.address, two.address, ucx_tls="tcp") as rank,
    ):
        before = rank.memory.copy()
        assert all(rank.put(prompt("a", pages)))
        sent = [node.statistics().sent_blocks_total for node in (one, two)]
        right, seen = get(rank, "a", pages)
        assert all(right)
        assert [number for number, _ in seen] == [0, 1]
        assert (rank.memory[:, :pages] == before[:, :pages]).all()
        put = [node.statistics().sent_blocks_total - count for node, count in zip((one, two), sent)]
        assert all(put)
        assert sum(put) == pages, "blocks in parts are counted once"


@pytest.mark.parametrize("tls", [None, "tcp"], ids=["mapped", "tcp"])
def test_nothing_is_told_of_a_chain_that_is_not_all_there(tls: str | None) -> None:
    with running_node() as node, a_rank(node.address, ucx_tls=tls) as rank:
        assert all(rank.put(prompt("a", PAGES - 1)))
        assert get(rank, "a") == ([True] * (PAGES - 1) + [False], [])


@pytest.mark.parametrize("tls", [None, "tcp"], ids=["mapped", "tcp"])
def test_the_answer_is_for_all_parts_that_were_told_of(tls: str | None) -> None:
    with running_node() as node, a_rank(node.address, ucx_tls=tls) as rank:
        assert all(rank.put(prompt("a", PAGES)))
        flip_a_byte(node, prompt("a", PAGES).keys[3])
        right, seen = get(rank, "a")
        assert right == [page != 3 for page in range(PAGES)]
        assert [number for number, _ in seen] == [0, 1]


@pytest.mark.parametrize("ways", [2, 4, 16], ids=["three chunks a piece", "a chunk and a half", "less"])
@pytest.mark.parametrize("tls", [None, "cma,tcp"], ids=["mapped", "cma"])
def test_what_comes_in_parts_is_checked_however_it_is_cut(tls: str | None, ways: int) -> None:
    """By two nodes; each part has some of K and some of V, as layers have."""
    half, pages = ways // 2, 16 * STRIPE_PAGES
    columns = [[slice(start, start + half), slice(ways + start, ways + start + half)] for start in (0, half)]
    with running_nodes(2) as nodes, a_rank(*[node.address for node in nodes], ucx_tls=tls) as rank:
        blocks, pieces = prompt("a", pages), split(rank.pieces(pages), ways)
        before = rank.memory.copy()
        assert all(rank.put(blocks))
        rank.memory[:, :pages] = 0
        stages = Stages(columns, lambda _number: None)
        assert rank.client.get(blocks, pieces, stages).all()
        assert (rank.memory[:, :pages] == before[:, :pages]).all()
        first = rank.client.membership.live
        for wrong, at in ((3, 1000), (pages - 2, BLOCK_BYTES - 1)):
            home = ranking(blocks.anchors[wrong], first, 1)[0]
            (node,) = (node for node in nodes if node.address == home)
            flip_a_byte(node, blocks.keys[wrong], at)
        right = rank.client.get(blocks, pieces, stages)
        assert np.flatnonzero(~right).tolist() == [3, pages - 2]


def test_a_block_that_was_written_anew_between_two_parts_is_not_told_of_again() -> None:
    """Parts that a node puts are found one after another."""
    with running_node() as node, a_rank(node.address, ucx_tls="tcp") as rank:
        blocks, seen = prompt("a", 3), []
        assert all(rank.put(blocks))

        def arrived(number: int) -> None:
            seen.append(number)
            if number == 0:
                drop(node, blocks.keys[2])
                with a_rank(node.address) as other:
                    assert all(other.put(blocks))

        right = rank.client.get(blocks, quarters(rank, 3), Stages(QUARTERS, arrived))
        assert not right.any()
        assert len(seen) < len(QUARTERS)


def quarters(rank: Rank, pages: int) -> Pieces:
    """Blocks of four pieces."""
    return split(rank.pieces(pages), 2)


def split(pieces: Pieces, ways: int) -> Pieces:
    """Each piece as so many."""
    size = pieces.piece_bytes // ways
    starts = np.arange(ways, dtype=np.uint64) * np.uint64(size)
    return Pieces((pieces.addresses[:, :, None] + starts).reshape(len(pieces.addresses), -1), size)


def drop(node: RunningNode, key: bytes) -> None:
    """Have a node forget a block."""
    with node.connect() as control:
        located = control.request(Locate(control.next_id(), key, 5), 5)
        control.send(ReportCorrupt(key, located.generation_blob))
        control.send(Release(located.lease))
        while control.request(Peek(control.next_id(), key), 5).present != b"\0":
            pass


@pytest.mark.parametrize("tls", ["cma,tcp", "tcp"], ids=["cma", "tcp"])
def test_nothing_more_is_told_of_once_a_part_did_not_come(tls: str) -> None:
    with FaultyNode("64MiB").start() as node, a_rank(node.address, ucx_tls=tls) as rank:
        blocks, seen = prompt("a", PAGES), []
        assert all(rank.put(blocks))

        def arrived(number: int) -> None:
            seen.append(number)
            if number == 0:
                node.kill()

        right = rank.client.get(blocks, quarters(rank, PAGES), Stages(QUARTERS, arrived))
        assert not right.any()
        assert seen == [0] or (tls == "tcp" and seen == [0, 1]), "a node may have put one part ahead"


def test_a_frozen_node_takes_no_other_with_it() -> None:
    """It uses the time for the first part up, while the others have sent their second."""
    pages = 16 * STRIPE_PAGES
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(3))
        rank = stack.enter_context(a_rank(*[node.address for node in nodes], ucx_tls="tcp", deadline_s=1.5))
        assert all(rank.put(prompt("a", pages)))
        nodes[0].freeze()
        right, seen = get(rank, "a", pages)
        assert (any(right), seen) == (False, [])
        assert rank.client.membership.live.keys() == {node.address for node in nodes[1:]}


def test_reading_that_is_given_up_between_parts_leaves_nothing_for_the_next() -> None:
    with running_node() as node, a_rank(node.address, ucx_tls="tcp") as rank:
        assert all(rank.put(prompt("a", PAGES)))

        def arrived(number: int) -> None:
            raise LookupError(number)

        with pytest.raises(LookupError):
            rank.client.get(prompt("a", PAGES), quarters(rank, PAGES), Stages(QUARTERS, arrived))
        wait_until_live(rank, 1)
        assert all(rank.get(prompt("a", PAGES)))


def test_blocks_in_more_parts_than_a_node_sends_come_whole() -> None:
    with running_node() as node, a_rank(node.address, ucx_tls="tcp") as rank:
        blocks, seen = prompt("a", PAGES), []
        assert all(rank.put(blocks))
        count = 3 * MAX_PULL_PARTS
        columns = [[slice(at, at + 1) for at in range(half, count, 2)] for half in range(2)]
        pieces = split(rank.pieces(PAGES), count // 2)
        assert rank.client.get(blocks, pieces, Stages(columns, seen.append)).all()
        assert seen == []


def test_a_copy_does_not_make_right_what_was_told_of_and_was_wrong() -> None:
    blocks = prompt("hot", PAGES)
    with a_pool() as (rank, nodes):
        assert all(rank.put(blocks))
        for _ in range(2):
            assert all(rank.get(blocks))
        for node in nodes.values():
            wait_until_held(node, PAGES)
        wait_until_live(rank, 2)
        home = ranking(blocks.anchors[0], rank.client.membership.live, 1)[0]
        flip_a_byte(nodes[home], blocks.keys[3])
        right, seen = get(rank, "hot")
        assert len(seen) == 2
        assert right == [page != 3 for page in range(PAGES)]
        assert all(rank.get(blocks)), "the copy was not there"
