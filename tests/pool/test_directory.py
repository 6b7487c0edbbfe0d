"""What a memory node of this host has is read without asking it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import numpy as np

from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.transport.messages import Statistics, Used
from tests.pool.rank import a_rank, prompt, wait_until_live
from tests.pool.test_node import eventually
from tests.support import running_node, running_nodes

BLOCKS = 64
MIB = 1 << 20


def test_blocks_are_read_while_their_node_answers_nothing():
    with running_node("64MiB") as node, a_rank(node.address) as rank:
        before = rank.memory.copy()
        blocks = prompt("frozen", BLOCKS)
        assert rank.put(blocks) == [True] * BLOCKS
        node.freeze()
        for count in (1, 10, BLOCKS):
            assert rank.get(prompt("frozen", count)) == [True] * count
            assert (rank.memory == before).all()
        os.kill(node.pid, signal.SIGCONT)
        # The node learns of it all the same, and has moved no byte.
        eventually(lambda: node.statistics().hits_total == 1 + 10 + BLOCKS)
        assert node.statistics().sent_blocks_total == 0


def test_much_is_read_at_once_and_nothing_is():
    with running_node("128MiB") as node, a_rank(node.address, deadline_s=5.0) as rank:
        length = 3 * MIB
        memory = np.random.default_rng(5).integers(0, 256, (12, length), np.uint8)
        before = memory.copy()
        rank.client.register(memory.ctypes.data, memory.nbytes)
        pieces = Pieces((memory.ctypes.data + np.arange(12, dtype=np.uint64) * length)[:, None], length)
        assert rank.client.put(prompt("much", 12), pieces).all()
        node.freeze()
        memory[:] = 0
        assert rank.client.get(prompt("much", 12), pieces).all()
        assert (memory == before).all()
        assert len(rank.client.get(prompt("none", 0), pieces._replace(addresses=pieces.addresses[:0]))) == 0


def test_a_node_is_asked_for_what_its_directory_does_not_have():
    with running_node("64MiB") as node, a_rank(node.address) as rank:
        before = rank.memory.copy()
        assert rank.put(prompt("known", 40)) == [True] * 40
        assert rank.get(prompt("known", BLOCKS)) == [True] * 40 + [False] * (BLOCKS - 40)
        assert (rank.memory[:, :40] == before[:, :40]).all()
        assert node.statistics().hits_total == 40


def test_blocks_of_several_nodes_and_copies_of_them_come_back():
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(3))
        rank = stack.enter_context(a_rank(*[node.address for node in nodes], copies=2))
        wait_until_live(rank, 3)
        before = rank.memory.copy()
        blocks = prompt("several", BLOCKS)
        assert rank.put(blocks) == [True] * BLOCKS
        for _ in range(3):
            assert rank.get(blocks) == [True] * BLOCKS
            assert (rank.memory == before).all()
        # Read again and again, they are hot: their copies are where they are looked for next.
        eventually(lambda: sum(node.statistics().blocks for node in nodes) == 2 * BLOCKS)
        nodes[0].kill()
        rank.client.peek(blocks)
        assert rank.get(blocks) == [True] * BLOCKS
        assert (rank.memory == before).all()


def test_a_node_that_reads_no_hints_is_spared_them():
    with running_node("64MiB") as node, node.connect() as control:
        used = Used(b"".join(prompt("hint", BLOCKS).keys))
        node.freeze()
        for _ in range(16_000):  # 16 MiB: more than a socket takes
            control.hint(used, 0.001)
        os.kill(node.pid, signal.SIGCONT)
        told = control.request(Statistics(control.next_id()), 10.0).hits_total
        assert 0 < told < 16_000 * BLOCKS
        assert told % BLOCKS == 0


def test_what_was_read_stays_longer_than_what_was_not():
    with running_node("8MiB") as node, a_rank(node.address) as rank:
        read, unread = prompt("read", 40), prompt("unread", 40)
        assert rank.put(read) == rank.put(unread) == [True] * 40
        assert rank.get(read) == [True] * 40
        eventually(lambda: node.statistics().hits_total == 40)
        for number in range(5):
            assert rank.put(prompt(f"more {number}", 30)) == [True] * 30
        assert rank.client.peek(read) == 40
        assert rank.client.peek(unread) < 40


def test_blocks_that_are_evicted_while_they_are_read_are_misses():
    """A node of few blocks, all of which other clients replace again and again."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(running_node("8MiB"))
        reader = stack.enter_context(a_rank(node.address))
        # The node has room for the blocks of two of them, and some.
        writers = [stack.enter_context(a_rank(node.address, seed=seed)) for seed in (1, 2, 3)]

        def replace() -> None:
            while not stop.is_set():
                for seed, writer in enumerate(writers):
                    writer.put(prompt(f"of {seed}", BLOCKS))

        replacing = threading.Thread(target=replace)
        replacing.start()
        read = 0
        try:
            for _ in range(150):
                for seed, writer in enumerate(writers):
                    got = np.flatnonzero(reader.get(prompt(f"of {seed}", BLOCKS)))
                    assert (reader.memory[:, got] == writer.memory[:, got]).all()
                    read += len(got)
        finally:
            stop.set()
            replacing.join()
        assert read > 1000
        assert reader.client.statistics().corrupt_blocks == 0
        assert node.statistics().evictions_total > BLOCKS
