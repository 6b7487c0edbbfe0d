"""The scheduler's loop gives way to threads that fetch for it."""

from __future__ import annotations

import time
from typing import Final

_YIELD_S: Final = 200e-6
_GAP_S: Final = 400e-6


class GivingWay:
    """Lets other threads have the GIL while requests wait for what they fetch; once per scheduling pass.

    The scheduler polls in a tight loop where nothing else can run, and a thread that wants the GIL would wait
    a switch interval (5 ms) for every step of its fetch. However many requests wait, and for whatever, a pass
    gives way once: all that poll share one of these. Scheduler thread only.
    """

    def __init__(self) -> None:
        self._next = 0.0  # time.monotonic

    def give_way(self) -> None:
        """Sleep a moment, unless this pass has."""
        if time.monotonic() >= self._next:
            time.sleep(_YIELD_S)
            self._next = time.monotonic() + _GAP_S
