"""A memory node that only TCP leads to, and a connection to it that blocks may go through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polarkv_sglang.transport.control import ControlConnection
from tests.pool.streams import streaming
from tests.support import RunningNode, running_node


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with running_node("64MiB", "--ucx-tls", "tcp") as node:
        yield node


@pytest.fixture
def control(node: RunningNode) -> Iterator[ControlConnection]:
    with streaming(node) as control:
        yield control
