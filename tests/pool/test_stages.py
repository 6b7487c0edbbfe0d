"""Blocks that are read part by part: what is told of before the answer, and what the answer is for."""

from __future__ import annotations

import pytest

from polarkv_sglang.pool.blocks import Stages
from polarkv_sglang.pool.placement import ranking
from tests.faults.nodes import FaultyNode
from tests.pool.rank import STRIPE_PAGES, Rank, a_rank, flip_a_byte, prompt, wait_until_live
from tests.pool.test_copies import a_pool, wait_until_held
from tests.support import running_node

PAGES = STRIPE_PAGES
PIECES = [[slice(0, 1)], [slice(1, 2)]]  # a stage for each piece of a block


def get(rank: Rank, name: str, pages: int = PAGES) -> tuple[list[bool], list[tuple[int, list[bool]]]]:
    """The answer, and at each arrival its number and which pieces of all blocks were there."""
    blocks, seen = prompt(name, pages), []
    rank.memory[:, :pages] = 0

    def arrived(number: int) -> None:
        seen.append((number, [bool(piece.any()) for piece in rank.memory[:, :pages]]))

    right = rank.client.get(blocks, rank.pieces(pages), Stages(PIECES, arrived))
    return right.tolist(), seen


@pytest.mark.parametrize("tls", [None, "cma,tcp"], ids=["mapped", "cma"])
def test_parts_arrive_in_order_and_make_whole_blocks(tls: str | None) -> None:
    with running_node() as node, a_rank(node.address, ucx_tls=tls) as rank:
        before = rank.memory.copy()
        assert all(rank.put(prompt("a", PAGES)))
        assert get(rank, "a") == ([True] * PAGES, [(0, [True, False]), (1, [True, True])])
        assert (rank.memory[:, :PAGES] == before[:, :PAGES]).all()


def test_where_parts_cannot_be_read_whole_blocks_come_and_no_arrival_is_told() -> None:
    with running_node("64MiB", "--ucx-tls", "tcp") as node, a_rank(node.address, ucx_tls="tcp") as rank:
        assert all(rank.put(prompt("a", PAGES)))
        assert get(rank, "a") == ([True] * PAGES, [])


def test_nothing_is_told_of_a_chain_that_is_not_all_there() -> None:
    with running_node() as node, a_rank(node.address) as rank:
        assert all(rank.put(prompt("a", PAGES - 1)))
        assert get(rank, "a") == ([True] * (PAGES - 1) + [False], [])


def test_the_answer_is_for_all_parts_that_were_told_of() -> None:
    with running_node() as node, a_rank(node.address) as rank:
        assert all(rank.put(prompt("a", PAGES)))
        flip_a_byte(node, prompt("a", PAGES).keys[3])
        right, seen = get(rank, "a")
        assert right == [page != 3 for page in range(PAGES)]
        assert [number for number, _ in seen] == [0, 1]


def test_nothing_more_is_told_of_once_a_part_did_not_come() -> None:
    with FaultyNode("64MiB").start() as node, a_rank(node.address, ucx_tls="cma,tcp") as rank:
        blocks, seen = prompt("a", PAGES), []
        assert all(rank.put(blocks))

        def arrived(number: int) -> None:
            seen.append(number)
            node.kill()

        right = rank.client.get(blocks, rank.pieces(PAGES), Stages(PIECES, arrived))
        assert not right.any()
        assert seen == [0]


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
