"""How fast a forward pass goes through its layers."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter

_SMOOTHING: Final = 0.5  # weight of the latest pass


class _Mark(NamedTuple):
    """A moment of the pass: on the host, or on the stream that computes."""

    host: float
    stream: torch.cuda.Event | None

    @classmethod
    def now(cls, device: torch.device) -> _Mark:
        if device.type != "cuda":
            return cls(time.perf_counter(), None)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return cls(0.0, event)

    def seconds_to(self, later: _Mark) -> float | None:
        """None if the stream has not come so far yet."""
        if self.stream is None or later.stream is None:
            return later.host - self.host
        if not later.stream.query():  # type: ignore[no-untyped-call]
            return None
        return float(self.stream.elapsed_time(later.stream)) / 1e3


class PacedLoadCounter(LayerWiseLoadCounter):
    """SGLang's counter of layers that have arrived, which also learns how long a layer computes.

    That is the time from when a layer was there until the next one is asked for, in passes that load. The
    host may run ahead of a GPU, so there it is measured on the stream. Used by the thread that runs the
    forward pass; ``layer_s`` may be read by any. Ranks may differ in it: nothing that they do together
    depends on it.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        super().__init__(num_layers)
        self.layer_s = 0.0  # seconds, smoothed over passes; 0 until one was measured
        self._device = device
        self._asked: dict[int, _Mark] = {}  # by layer, in the pass that runs
        self._there: dict[int, _Mark] = {}
        self._measuring = -1  # the pass they are of

    def wait_until(self, threshold: int) -> None:
        index = self.consumer_index
        if index not in self.futures:
            return
        if index != self._measuring:
            self._learn()
            self._measuring = index
        # A pass asks several times for one layer.
        first = threshold not in self._asked
        if first:
            self._asked[threshold] = _Mark.now(self._device)
        super().wait_until(threshold)
        if first:
            self._there[threshold] = _Mark.now(self._device)

    def was_asked(self, index: int) -> bool:
        """Whether a pass has waited for layers of ``index``; told until it is finished."""
        return index == self._measuring

    def finish(self, index: int) -> bool:
        if index == self._measuring and self._device.type != "cuda":
            self._learn()
        return bool(super().finish(index))

    def reset(self) -> None:
        super().reset()
        self._asked, self._there, self._measuring = {}, {}, -1

    def _learn(self) -> None:
        """From the pass before: on a GPU it is over only when the next one has begun."""
        spans = [
            there.seconds_to(self._asked[layer + 1])
            for layer, there in self._there.items()
            if layer + 1 in self._asked
        ]
        known = [span for span in spans if span is not None]
        self._asked, self._there = {}, {}
        if known:
            latest = sum(known) / len(known)
            self.layer_s += (latest - self.layer_s) * (_SMOOTHING if self.layer_s else 1.0)
