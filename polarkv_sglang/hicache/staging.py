"""Where the bytes of blocks pass between L1 and the pool."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from polarkv_sglang.kernels.layout import LayerRange, PagedPool
from polarkv_sglang.kernels.pack import pack_blocks, unpack_blocks
from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport.messages import MAX_FETCH_REGIONS, MAX_FETCH_TARGETS, MAX_KEYS

_STAGING_BYTES: Final = 64 << 20


class Passage(ABC):
    """One direction's way between L1 and registered memory; used by one thread.

    ``starts`` are the first slots of pages, int64 [blocks] on the CPU, at most ``most_blocks`` of them.
    """

    most_blocks: int

    def __init__(self, pool: PagedPool) -> None:
        self.pool = pool
        parts = range(len(pool.parts))
        # A piece lies in one layer. Where K and V of a page differ in length, both are cut into pieces of a
        # length that divides them.
        self.piece_bytes = math.gcd(*(pool.layer_bytes(part) for part in parts))
        self._layer_pieces = [pool.layer_bytes(part) // self.piece_bytes for part in parts]
        self.block_pieces = pool.block_bytes // self.piece_bytes

    def columns(self, layers: LayerRange) -> list[slice]:
        """The pieces of a block that hold some layers: a run for K and one for V."""
        runs, first = [], 0
        for count in self._layer_pieces:
            runs.append(slice(first + layers.start * count, first + layers.end * count))
            first += self.pool.layers * count
        return runs

    @abstractmethod
    def pieces(self, starts: torch.Tensor) -> Pieces:
        """Where the bytes of those pages' blocks are read from, or to be written to."""

    @abstractmethod
    def leave(self, starts: torch.Tensor) -> None:
        """Bring pages from L1 to their ``pieces``; done when it returns."""

    @abstractmethod
    def enter(self, starts: torch.Tensor, layers: LayerRange | None = None) -> None:
        """Bring blocks, or some layers of them, from their ``pieces`` to L1; done when it returns."""


class InPlace(Passage):
    """L1 is host memory: the pool reads and writes it where it lies, in pieces of one layer."""

    def __init__(self, pool: PagedPool, client: PoolClient) -> None:
        """Raises TransportError if UCX refuses to register L1."""
        super().__init__(pool)
        for layers in pool.parts:
            for layer in layers:
                client.register(layer.data_ptr(), layer.numel())
        bases, strides = [], []
        for part in range(len(pool.parts)):
            for pointer in pool.pointers[part].tolist():
                for offset in range(0, pool.layer_bytes(part), self.piece_bytes):
                    bases.append(pointer + offset)
                    strides.append(pool.slot_stride(part))
        self._bases = np.array(bases, np.uint64)
        self._strides = np.array(strides, np.uint64)
        self.most_blocks = max(1, min(MAX_KEYS, MAX_FETCH_TARGETS // len(bases)))

    @staticmethod
    def fits(pool: PagedPool) -> bool:
        """Whether L1 can be used where it lies."""
        gaps = any(pool.slot_stride(part) != pool.token_bytes(part) for part in range(len(pool.parts)))
        buffers = len(pool.parts) * pool.layers
        return pool.device.type == "cpu" and not gaps and buffers <= MAX_FETCH_REGIONS

    def pieces(self, starts: torch.Tensor) -> Pieces:
        slots: npt.NDArray[np.uint64] = starts.numpy().astype(np.uint64)
        return Pieces(self._bases + slots[:, None] * self._strides, self.piece_bytes)

    def leave(self, starts: torch.Tensor) -> None:
        """They are there."""

    def enter(self, starts: torch.Tensor, layers: LayerRange | None = None) -> None:
        """They are there."""


class Staged(Passage):
    """Blocks pass through host memory, pinned where L1 is a GPU's, packed and unpacked on L1's device."""

    def __init__(self, pool: PagedPool, client: PoolClient) -> None:
        """Raises TransportError if UCX refuses to register the staging memory."""
        super().__init__(pool)
        most = min(MAX_KEYS, MAX_FETCH_TARGETS // self.block_pieces, _STAGING_BYTES // pool.block_bytes)
        self.most_blocks = max(1, most)
        shape = (self.most_blocks, pool.block_bytes)
        on_gpu = pool.device.type == "cuda"
        self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.empty(shape, dtype=torch.uint8, device=pool.device) if on_gpu else self._host
        self._stream = torch.cuda.Stream(pool.device) if on_gpu else None  # type: ignore[no-untyped-call]
        client.register(self._host.data_ptr(), self._host.numel())
        pieces = np.arange(self.most_blocks * self.block_pieces, dtype=np.uint64)
        offsets = pieces * np.uint64(self.piece_bytes)
        self._addresses = (np.uint64(self._host.data_ptr()) + offsets).reshape(-1, self.block_pieces)

    def pieces(self, starts: torch.Tensor) -> Pieces:
        return Pieces(self._addresses[: len(starts)], self.piece_bytes)

    def leave(self, starts: torch.Tensor) -> None:
        count = len(starts)
        with torch.cuda.stream(self._stream):  # without one, nothing
            pack_blocks(self.pool, starts.to(self.pool.device), self._device[:count])
            if self._stream is not None:
                self._host[:count].copy_(self._device[:count], non_blocking=True)
                self._stream.synchronize()

    def enter(self, starts: torch.Tensor, layers: LayerRange | None = None) -> None:
        count = len(starts)
        span = LayerRange(0, self.pool.layers) if layers is None else layers
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                for run in self.columns(span):
                    part = slice(run.start * self.piece_bytes, run.stop * self.piece_bytes)
                    self._device[:count, part].copy_(self._host[:count, part], non_blocking=True)
            unpack_blocks(self.pool, starts.to(self.pool.device), self._device[:count], span)
            if self._stream is not None:
                self._stream.synchronize()


def passage(pool: PagedPool, client: PoolClient) -> Passage:
    """The shortest way that ``pool`` has. Raises TransportError."""
    return InPlace(pool, client) if InPlace.fits(pool) else Staged(pool, client)


def clear_pages(pool: PagedPool, starts: torch.Tensor) -> None:
    """Zero whole pages, so that nothing that computes on them meets bytes which are not numbers.

    Done when it returns.
    """
    slots = (starts[:, None] + torch.arange(pool.page_size)).reshape(-1).to(pool.device)
    for part in pool.parts:
        for layer in part:
            layer[slots] = 0
    if pool.device.type == "cuda":
        torch.cuda.current_stream(pool.device).synchronize()
