"""Few blocks for a node on this host go through the connection, many between the memories of both."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.blocks import Chain, Stages
from polarkv_sglang.pool.placement import ranking
from tests.pool.rank import Rank, a_rank, flip_a_byte, prompt, wait_until_live
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node, running_nodes

FEW, MANY = 10, 11  # blocks of 48 KiB: 512 KiB is between
# A memory node that tells readers nothing of where blocks lie: it has to be asked.
_NO_DIRECTORY = """
import sys
from polarkv_sglang.cli import main
from polarkv_sglang.pool import node

share, shared = node.share, []

def share_the_first(fd, length):
    shared.append(fd)
    return share(fd, length) if len(shared) == 1 else None

node.share = share_the_first
sys.argv = sys.argv[3:]
sys.exit(main())
"""


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with running_node("64MiB", launcher=[sys.executable, "-c", _NO_DIRECTORY]) as running:
        yield running


def through_the_connection(node: RunningNode) -> int:
    """Blocks that were read like this."""
    return node.statistics().sent_blocks_total


@pytest.mark.parametrize(("count", "sent"), [(1, 1), (FEW, FEW), (MANY, 0)])
def test_blocks_come_back_whichever_way_they_go(node: RunningNode, count: int, sent: int):
    blocks = prompt("few", count)
    with a_rank(node.address) as rank:
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * count
        assert rank.get(blocks) == [True] * count
        assert (rank.memory == before).all()
        assert rank.client.statistics().put_blocks == count
    assert through_the_connection(node) == sent


@pytest.mark.parametrize("count", [FEW, MANY])
def test_a_flipped_byte_is_a_miss_and_the_block_is_dropped(node: RunningNode, count: int):
    blocks = prompt("flipped", count)
    with a_rank(node.address) as rank:
        rank.put(blocks)
        flip_a_byte(node, blocks.keys[3])
        assert rank.get(blocks) == [place != 3 for place in range(count)]
        eventually(lambda: node.statistics().corrupt_total == 1)
        assert rank.client.statistics().corrupt_blocks == 1
        assert rank.client.peek(blocks) == 3


def test_what_is_read_in_stages_never_goes_through_the_connection(node: RunningNode):
    blocks, told = prompt("staged", 2), []
    with a_rank(node.address) as rank:
        before = rank.memory.copy()
        rank.put(blocks)
        rank.memory[:, :2] = 0
        stages = Stages([[slice(0, 1)], [slice(1, 2)]], told.append)
        assert rank.client.get(blocks, rank.pieces(2), stages).tolist() == [True] * 2
        assert (rank.memory == before).all()
    assert told == [0, 1]
    assert through_the_connection(node) == 0


# A memory node that has no thread for anybody's connection.
_NO_THREADS = """
import sys
from polarkv_sglang.cli import main
from polarkv_sglang.pool import stream

def no_thread(*settings, **more):
    raise RuntimeError("can't start new thread")

stream.ThreadPoolExecutor = no_thread
sys.argv = sys.argv[3:]
sys.exit(main())
"""


@pytest.mark.parametrize("ucx_tls", [None, "tcp"])
def test_a_node_that_has_no_thread_for_a_connection_is_used_all_the_same(ucx_tls: str | None):
    flags = ("--ucx-tls", ucx_tls) if ucx_tls is not None else ()
    blocks = prompt("no threads", FEW)
    with (
        running_node("64MiB", *flags, launcher=[sys.executable, "-c", _NO_THREADS]) as node,
        a_rank(node.address, ucx_tls=ucx_tls, deadline_s=2.0) as rank,
    ):
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * FEW
        assert rank.client.peek(blocks) == FEW
        assert rank.get(blocks) == [True] * FEW
        assert (rank.memory == before).all()


def blocks_of(nodes: dict[str, int], counts: dict[str, int], name: str) -> Chain:
    """So many blocks that each node is the home of."""
    keys: list[bytes] = []
    anchors: list[bytes] = []
    for node, count in counts.items():
        anchor = next(
            number.to_bytes(16, "big")
            for number in range(1, 1000)
            if ranking(number.to_bytes(16, "big"), nodes, 1) == [node]
        )
        keys += prompt(f"{name} {node}", count).keys
        anchors += [anchor] * count
    return Chain(keys, [NO_PARENT, *keys[:-1]], anchors)


def get(rank: Rank, blocks: Chain) -> np.ndarray:
    return np.array(rank.get(blocks))


def test_a_frozen_node_of_few_blocks_leaves_others_the_time_for_theirs():
    with contextlib.ExitStack() as stack:
        frozen, healthy = stack.enter_context(running_nodes(2))
        rank = stack.enter_context(a_rank(frozen.address, healthy.address))
        wait_until_live(rank, 2)
        nodes = dict(rank.client.membership.live)
        # To read, what is behind the first miss is not got.
        known = blocks_of(nodes, {healthy.address: 40}, "known")
        unknown = blocks_of(nodes, {frozen.address: 4}, "unknown")
        assert rank.put(known) == [True] * 40
        frozen.freeze()
        started = time.monotonic()
        wanted = Chain(*([*ours, *others] for ours, others in zip(known, unknown)))
        assert get(rank, wanted).tolist() == [True] * 40 + [False] * 4
        assert time.monotonic() - started < 1.5 * rank.client.deadline_s
        assert rank.client.membership.live.keys() == {healthy.address}
        os.kill(frozen.pid, signal.SIGCONT)
        wait_until_live(rank, 2)
        frozen.freeze()
        new = blocks_of(nodes, {frozen.address: 4, healthy.address: 40}, "new")
        assert rank.put(new) == [False] * 4 + [True] * 40
        assert rank.client.membership.live.keys() == {healthy.address}
        os.kill(frozen.pid, signal.SIGCONT)
