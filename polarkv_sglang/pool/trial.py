"""Trying a memory node before it is used."""

from __future__ import annotations

from collections.abc import Callable

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.link import Lane
from polarkv_sglang.transport import Context
from polarkv_sglang.transport.messages import Welcome


class Trials:
    """Reaches memory nodes and leaves them again, one at a time, with a UCX context of its own.

    So a node that does not answer costs no lane of the rank its worker. A context makes no worker while one
    of the network devices that it found is down: after a trial that failed, the next has a new one.
    """

    def __init__(self, make_context: Callable[[], Context]) -> None:
        self._make_context = make_context
        self._context: Context | None = None
        self._lane: Lane | None = None

    def reach(self, welcome: Welcome, deadline_s: float) -> None:
        """TransportError if the node's memory cannot be reached in time."""
        if self._context is None:
            self._context = self._make_context()
        try:
            if self._lane is None:
                self._lane = Lane(self._context, reads=True)
            self._lane.try_out(welcome, deadline_s)
        except TransportError:
            self.close()
            raise

    def close(self) -> None:
        """Give up what trials have left open."""
        if self._lane is not None:
            self._lane.close()
        if self._context is not None:
            self._context.close()
        self._lane = self._context = None
