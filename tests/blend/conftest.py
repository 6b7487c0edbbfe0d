"""What those modules share that test_passes.py runs in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polarkv_sglang.blend.offline import OfflineModel
    from tests.blend.scheduler import Scheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OfflineModel:
    from tests.blend.fixtures import load

    return load("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def scheduler(model: OfflineModel) -> Iterator[Scheduler]:
    from tests.blend.scheduler import scheduling

    with scheduling(model) as running:
        yield running
