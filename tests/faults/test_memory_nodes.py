"""Memory nodes that fail under traffic: what was read is right, and no call outlasts its deadline."""

from __future__ import annotations

import contextlib

import pytest

from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, Traffic
from tests.faults.ways import WAYS


@pytest.mark.parametrize("tls", WAYS)
def test_a_node_killed_under_traffic_comes_back_empty_and_is_used_again(tls: str | None) -> None:
    with FaultyNode(tls=tls).start() as other, FaultyNode(tls=tls).start() as doomed:
        nodes = (other.address, doomed.address)
        with Traffic(Load(ucx_tls=tls), *nodes) as traffic:
            traffic.wait_for_nodes(*nodes)
            doomed.wait_for("hits_total", 100)
            doomed.kill()
            traffic.wait_for_nodes(other.address)
            traffic.wait_for_hits()
            doomed.start()
            traffic.wait_for_nodes(*nodes)
            doomed.wait_for("hits_total", 100)


@pytest.mark.parametrize("tls", WAYS)
def test_a_node_that_freezes_under_traffic_and_thaws(tls: str | None) -> None:
    with FaultyNode(tls=tls).start() as other, FaultyNode(tls=tls).start() as frozen:
        nodes = (other.address, frozen.address)
        with Traffic(Load(ucx_tls=tls), *nodes) as traffic:
            traffic.wait_for_nodes(*nodes)
            frozen.wait_for("hits_total", 100)
            frozen.freeze()
            traffic.wait_for_nodes(other.address)
            traffic.wait_for_hits()
            frozen.thaw()
            traffic.wait_for_nodes(*nodes)
            now = frozen.wait_for("hits_total", frozen.statistics().hits_total + 100)
            assert now.corrupt_total == 0, "a put that was given up wrote to a slot that was another block's"


def test_a_node_absent_at_the_start_is_used_from_when_it_is_there() -> None:
    with FaultyNode() as late, Traffic(Load(), late.address) as traffic:
        nothing = traffic.wait_until(lambda now: now.missed_blocks > 500, "reads miss")
        assert nothing.hit_blocks == nothing.stored_blocks == 0
        late.start()
        traffic.wait_for_nodes(late.address)
        traffic.wait_for_hits()


def test_a_pool_far_too_small_evicts_under_traffic() -> None:
    """Blocks of two lengths, so that memory changes from one to the other, too."""
    loads = [Load(prompts=16), Load(prompts=16, piece_bytes=20 << 10)]
    assert all(load.total_bytes > 2 * (8 << 20) for load in loads)
    with FaultyNode("8MiB").start() as node, contextlib.ExitStack() as stack:
        both = [stack.enter_context(Traffic(load, node.address)) for load in loads]
        now = node.wait_for("evictions_total", 1000)
        assert now.used_bytes <= now.capacity_bytes == 8 << 20
        for traffic in both:
            traffic.wait_for_hits()
        assert node.statistics().corrupt_total == 0, "a block was evicted under its reader"
