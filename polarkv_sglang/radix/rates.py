"""Measured prefill and transfer rates, and how the ranks agree on them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from polarkv_sglang.radix.policy import Rates

# A sample below these measures overhead, not throughput.
_MIN_PREFILL_TOKENS = 64
_MIN_TRANSFER_BYTES = 1 << 20
_SMOOTHING = 0.2


class _Rate:
    """Exponentially smoothed amount per second; None before the first sample."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, amount: float, seconds: float) -> None:
        if seconds <= 0:
            return
        sample = amount / seconds
        self.value = sample if self.value is None else self.value + _SMOOTHING * (sample - self.value)


class RateMeter:
    """This rank's rates, and the ones that all ranks agreed on last. Scheduler thread only."""

    def __init__(self) -> None:
        self._prefill = _Rate()
        self._pool = _Rate()
        self._load = _Rate()
        self._pool_seen = (0.0, 0.0)
        self.agreed = Rates()
        self.bytes_per_token = 0  # of the rank that holds most; pipeline stages differ. 0 until agreed

    def observe_prefill(self, tokens: int, launched: float) -> None:
        """A batch of ``tokens`` new prompt tokens, launched at ``launched`` (time.monotonic), has ended."""
        if tokens >= _MIN_PREFILL_TOKENS:
            self._prefill.add(tokens, time.monotonic() - launched)

    def observe_pool(self, got_bytes: float, get_s: float) -> None:
        """The pool client's counters now: bytes got since the start, and seconds spent on them."""
        moved, spent = got_bytes - self._pool_seen[0], get_s - self._pool_seen[1]
        if moved >= _MIN_TRANSFER_BYTES:
            self._pool.add(moved, spent)
            self._pool_seen = (got_bytes, get_s)

    def observe_load(self, count: int, seconds: float) -> None:
        """``count`` bytes were copied from host to device in ``seconds``."""
        if count >= _MIN_TRANSFER_BYTES:
            self._load.add(count, seconds)

    def agree(self, reduce_min: Callable[[torch.Tensor], None], bytes_per_token: int) -> None:
        """Take the lowest rate of all ranks for each; unknown where one rank has not measured it.

        A collective: every rank calls it at the same step.
        """
        mine = [rate.value for rate in (self._prefill, self._pool, self._load)]
        known = [-1.0 if value is None else value for value in mine]
        values = torch.tensor([*known, -bytes_per_token], dtype=torch.float64)
        reduce_min(values)
        *rates, most = values.tolist()
        self.agreed = Rates(*(None if value < 0 else value for value in rates))
        self.bytes_per_token = -int(most)
