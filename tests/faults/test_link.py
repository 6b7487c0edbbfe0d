"""Links that go down: neither end of a connection is told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from benchmarks.networks import Network, network, why_not
from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, TrafficProcess

LOAD = Load(token="link", ucx_tls="tcp")
DOWN_S = 2.5


@contextlib.contextmanager
def a_network(*links: int) -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(*links) as made:
        yield made


def test_a_link_that_goes_down_under_traffic_costs_one_deadline_until_it_is_up() -> None:
    with contextlib.ExitStack() as stack:
        hub, links = stack.enter_context(a_network(1, 1))
        nodes = [
            stack.enter_context(
                FaultyNode(tls="tcp", token=LOAD.token, host=link.address, launcher=link.host.launcher)
            )
            for link in links
        ]
        here, there = [node.start().address for node in nodes]
        traffic = stack.enter_context(TrafficProcess(LOAD, here, there, launcher=hub.launcher))
        traffic.wait_for_nodes(here, there)
        traffic.wait_for_hits()
        links[1].down()
        traffic.wait_for_nodes(here)
        traffic.wait_for_hits()
        links[1].up()
        traffic.wait_for_nodes(here, there)
        traffic.wait_for_hits()
        traffic.stop()


def test_blocks_that_are_streamed_do_not_need_the_data_network() -> None:
    """They go through connections of the control network, which stands; UCX's has to be there first."""
    with contextlib.ExitStack() as stack:
        hub, (control, data) = stack.enter_context(a_network(2))
        near = stack.enter_context(
            FaultyNode(
                tls="tcp",
                token=LOAD.token,
                environment={"UCX_NET_DEVICES": "lo"},
                launcher=hub.launcher,
            )
        )
        far = stack.enter_context(
            FaultyNode(
                tls="tcp",
                token=LOAD.token,
                host=control.address,
                environment={"UCX_NET_DEVICES": data.device},
                launcher=control.host.launcher,
            )
        )
        here, there = near.start().address, far.start().address
        traffic = stack.enter_context(TrafficProcess(LOAD, here, there, launcher=hub.launcher))
        traffic.wait_for_nodes(here, there)
        traffic.wait_for_hits()
        before = traffic.tally()
        data.down()
        end = time.monotonic() + DOWN_S
        while time.monotonic() < end:
            traffic.wait_for_hits(1)
        assert traffic.tally().failed_batches == before.failed_batches
        data.up()
        traffic.wait_for_nodes(here, there)
        traffic.wait_for_hits()
        traffic.stop()
