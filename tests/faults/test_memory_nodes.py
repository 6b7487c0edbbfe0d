"""Memory nodes that fail under traffic: what was read is right, and no call outlasts its deadline."""

from __future__ import annotations

import contextlib

import pytest

from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, Traffic
from tests.faults.ways import WAYS


@pytest.mark.parametrize(
    ("ending", "tls"), [*(("killed", tls) for tls in WAYS), ("stopped", None)], ids=lambda value: str(value)
)
def test_a_node_that_ends_under_traffic_and_comes_back_empty(ending: str, tls: str | None) -> None:
    with FaultyNode(tls=tls).start() as other, FaultyNode(tls=tls).start() as doomed:
        nodes = (other.address, doomed.address)
        with Traffic(Load(ucx_tls=tls), *nodes) as traffic:
            traffic.wait_for_nodes(*nodes)
            doomed.wait_until(lambda now: now.hits_total > 100, "it is in use")
            doomed.kill() if ending == "killed" else doomed.stop()
            traffic.wait_for_nodes(other.address)
            traffic.wait_for_hits()
            doomed.start()
            traffic.wait_for_nodes(*nodes)
            doomed.wait_until(lambda now: now.hits_total > 100, "it is in use again")


@pytest.mark.parametrize("tls", WAYS)
def test_a_node_that_freezes_under_traffic_and_thaws(tls: str | None) -> None:
    with FaultyNode(tls=tls).start() as other, FaultyNode(tls=tls).start() as frozen:
        nodes = (other.address, frozen.address)
        with Traffic(Load(ucx_tls=tls), *nodes) as traffic:
            traffic.wait_for_nodes(*nodes)
            frozen.wait_until(lambda now: now.hits_total > 100, "it is in use")
            frozen.freeze()
            traffic.wait_for_nodes(other.address)
            traffic.wait_for_hits()
            frozen.thaw()
            traffic.wait_for_nodes(*nodes)
            hits = frozen.statistics().hits_total
            frozen.wait_until(lambda now: now.hits_total > hits + 100, "it is in use again")


def test_nodes_absent_at_the_start_are_used_from_when_they_are_there() -> None:
    with FaultyNode() as first, FaultyNode() as second:
        nodes = (first.address, second.address)
        with Traffic(Load(), *nodes) as traffic:
            nothing = traffic.wait_until(lambda now: now.missed_blocks > 500, "reads miss")
            assert nothing.hit_blocks == nothing.stored_blocks == 0
            first.start()
            traffic.wait_for_nodes(first.address)
            traffic.wait_for_hits()
            second.start()
            traffic.wait_for_nodes(*nodes)
            second.wait_until(lambda now: now.hits_total > 100, "it is read from")


@pytest.mark.parametrize("tls", WAYS)
def test_a_pool_far_too_small_evicts_under_traffic(tls: str | None) -> None:
    """Blocks of two lengths, so that memory changes from one to the other, too."""
    with FaultyNode("8MiB", tls=tls).start() as node, contextlib.ExitStack() as stack:
        loads = [
            Load(ucx_tls=tls, prompts=16),
            Load(ucx_tls=tls, prompts=16, piece_bytes=20 << 10),
        ]
        assert all(load.total_bytes > 2 * (8 << 20) for load in loads)
        both = [stack.enter_context(Traffic(load, node.address)) for load in loads]
        for traffic in both:
            traffic.wait_for_hits()
        now = node.wait_until(lambda now: now.evictions_total > 1000, "it evicts")
        assert now.used_bytes <= now.capacity_bytes == 8 << 20
        for traffic in both:
            traffic.wait_for_hits()
