"""The counter of layers makes passes wait, and learns what a layer computes, whatever it waits for."""

from __future__ import annotations

import pkgutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.tp_worker import TpModelWorker

from polarkv_sglang import compat
from polarkv_sglang.engine import _await_layers
from polarkv_sglang.hicache import pace
from polarkv_sglang.hicache.pace import PacedLoadCounter

LAYERS = 4


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)


def run_pass(counter: PacedLoadCounter, clock: Clock, compute_s: float, wait_s: float) -> None:
    """A forward pass over layers that arrive ``wait_s`` after they are asked for."""
    index = counter.update_producer()
    counter.set_consumer(index)
    for layer in range(LAYERS):

        def arrive(layer: int = layer) -> None:
            time.sleep(0.01)
            clock.now += wait_s
            counter.complete(index, layer)

        arrival = threading.Thread(target=arrive)
        arrival.start()
        for _ in "KV":  # asked for more than once
            counter.wait_until(layer)
        arrival.join()
        clock.now += compute_s
    assert counter.finish(index)


def test_waiting_for_a_layer_is_not_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter = Clock(monkeypatch), PacedLoadCounter(LAYERS, torch.device("cpu"))
    assert counter.layer_s == 0
    run_pass(counter, clock, compute_s=3.0, wait_s=50.0)
    assert counter.layer_s == pytest.approx(3.0)


def test_later_passes_move_it_half_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter = Clock(monkeypatch), PacedLoadCounter(LAYERS, torch.device("cpu"))
    run_pass(counter, clock, compute_s=3.0, wait_s=0.0)
    run_pass(counter, clock, compute_s=1.0, wait_s=5.0)
    assert counter.layer_s == pytest.approx(2.0)


def test_passes_without_loads_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter = Clock(monkeypatch), PacedLoadCounter(LAYERS, torch.device("cpu"))
    run_pass(counter, clock, compute_s=3.0, wait_s=0.0)
    for layer in range(LAYERS):
        counter.wait_until(layer)
        clock.now += 99.0
    counter.set_consumer(-1)
    counter.wait_until(0)
    run_pass(counter, clock, compute_s=3.0, wait_s=0.0)
    assert counter.layer_s == pytest.approx(3.0)


@pytest.mark.parametrize("path", compat.HASTY_PASSES)
def test_passes_that_embed_or_are_split_are_told_what_to_wait_for(path: str) -> None:
    compat.apply_hooks({path: _await_layers}, around=True)
    counter = PacedLoadCounter(2, torch.device("cpu"))
    worker = object.__new__(TpModelWorker)
    worker.hicache_layer_transfer_counter = counter
    batch = SimpleNamespace(hicache_consumer_index=3, split_index=0)
    with pytest.raises(AttributeError):  # there is no model
        pkgutil.resolve_name(path)(worker, batch)
    assert counter.consumer_index == 3


def test_a_counter_that_starts_over_knows_of_no_pass() -> None:
    counter = PacedLoadCounter(1, torch.device("cpu"))
    for asked in (True, False):
        index = counter.update_producer()
        counter.complete(index, 0)
        if asked:
            counter.set_consumer(index)
            counter.wait_until(0)
        assert counter.was_asked(index) == asked
        counter.reset()
