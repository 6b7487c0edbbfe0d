"""A rolling hash over tokens: equal windows have equal hashes, wherever they stand."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_MODULUS: Final = 1 << 64
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_INVERSE: Final = pow(_BASE, -1, _MODULUS)
_MIX: Final = np.uint64(0xBF58476D1CE4E5B9)


class RollingHash:
    """Hashes of all windows of ``window`` tokens; who compares hashes has to compare the tokens too.

    The hash of a window is a polynomial in _BASE modulo 2**64. All windows come from one running sum, so a
    prompt costs a few passes over it, whatever the window's length.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._powers = np.ones(1, np.uint64)
        self._inverses = np.ones(1, np.uint64)

    def hashes(self, tokens: Tokens) -> Hashes:
        """uint64 [len(tokens) - window + 1]: hash of the window at each offset; empty if too short."""
        count = len(tokens) - self.window + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        self._grow(len(tokens))
        digits = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX
        digits ^= digits >> np.uint64(29)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(digits * self._inverses[: len(tokens)], out=sums[1:])
        return (sums[self.window :] - sums[:count]) * self._powers[:count]

    def _grow(self, length: int) -> None:
        if length <= len(self._powers):
            return
        size = max(length, 2 * len(self._powers))
        self._powers, self._inverses = (_powers(base, size) for base in (_BASE, _INVERSE))


def _powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
