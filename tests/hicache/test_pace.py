"""The counter of layers learns what a layer computes, whatever it waits for in between."""

from __future__ import annotations

import threading
import time

import pytest
import torch

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
