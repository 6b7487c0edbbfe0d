"""For tests of direct mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.nodes import FaultyNode


@pytest.fixture
def node() -> Iterator[FaultyNode]:
    with FaultyNode("64MiB").start() as running:
        yield running
