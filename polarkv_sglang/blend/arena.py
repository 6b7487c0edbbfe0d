"""Host memory that donors' blocks arrive in from the pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.pool.client import PoolClient


class Arena:
    """``capacity_bytes`` of registered memory in blocks of one length, taken and given back by any thread."""

    def __init__(
        self, client: PoolClient, block_bytes: int, capacity_bytes: int, device: torch.device
    ) -> None:
        """Pinned if ``device`` is a GPU. Raises TransportError if UCX refuses to register it."""
        self.blocks = torch.empty(
            (capacity_bytes // block_bytes, block_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        if len(self.blocks):
            client.register(self.blocks.data_ptr(), self.blocks.numel())
        self._free = list(range(len(self.blocks)))
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Rows of ``blocks``; None if there are not so many."""
        with self._lock:
            if count > len(self._free):
                return None
            rows = self._free[len(self._free) - count :]
            del self._free[len(self._free) - count :]
            return rows

    def give_back(self, rows: Sequence[int]) -> None:
        """Nothing reads or writes them any more."""
        with self._lock:
            self._free = sorted([*self._free, *rows])  # what is consecutive is moved at once

    def pieces(self, rows: Sequence[int]) -> Pieces:
        """Where the blocks of those rows lie."""
        block_bytes = self.blocks.shape[1]
        offsets: npt.NDArray[np.uint64] = np.array(rows, np.uint64) * np.uint64(block_bytes)
        return Pieces((np.uint64(self.blocks.data_ptr()) + offsets)[:, None], block_bytes)
