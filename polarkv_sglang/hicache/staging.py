"""Where the bytes of blocks pass between L1 and the pool."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from polarkv_sglang.errors import TransportError
from polarkv_sglang.kernels.checksum import checksum_blocks
from polarkv_sglang.kernels.layout import LayerRange, PagedPool
from polarkv_sglang.kernels.pack import pack_blocks, unpack_blocks
from polarkv_sglang.pool.blocks import Blocks, Pieces
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
    """Blocks pass through memory of their own, packed and unpacked on L1's device.

    That memory is on the device where UCX can read and write it there (GPUDirect where it can). Else it is
    host memory, pinned where L1 is a GPU's, and copied to and from the device.
    """

    def __init__(self, pool: PagedPool, client: PoolClient, *, on_device: bool) -> None:
        """Raises TransportError if UCX refuses to register the staging memory."""
        super().__init__(pool)
        most = min(MAX_KEYS, MAX_FETCH_TARGETS // self.block_pieces, _STAGING_BYTES // pool.block_bytes)
        self.most_blocks = max(1, most)
        shape = (self.most_blocks, pool.block_bytes)
        on_gpu = pool.device.type == "cuda"
        self._device = torch.empty(shape, dtype=torch.uint8, device=pool.device)
        separate = on_gpu and not on_device
        self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if separate else None
        self._stream = torch.cuda.Stream(pool.device) if on_gpu else None  # type: ignore[no-untyped-call]
        registered = self._device if self._host is None else self._host
        client.register(registered.data_ptr(), registered.numel(), cuda=registered.is_cuda)
        pieces = np.arange(self.most_blocks * self.block_pieces, dtype=np.uint64)
        offsets = pieces * np.uint64(self.piece_bytes)
        self._addresses = (np.uint64(registered.data_ptr()) + offsets).reshape(-1, self.block_pieces)
        self._checksums = self._checksums_on_device if on_device else None

    def pieces(self, starts: torch.Tensor) -> Pieces:
        return Pieces(self._addresses[: len(starts)], self.piece_bytes, self._checksums)

    def _checksums_on_device(self, blocks: Blocks) -> npt.NDArray[np.uint64]:
        with torch.cuda.stream(self._stream):
            if len(blocks) and (np.diff(blocks) == 1).all():
                return checksum_blocks(self._device[blocks[0] : blocks[-1] + 1])
            return checksum_blocks(self._device[torch.from_numpy(blocks).to(self._device.device)])

    def leave(self, starts: torch.Tensor) -> None:
        count = len(starts)
        with torch.cuda.stream(self._stream):  # without one, nothing
            pack_blocks(self.pool, starts.to(self.pool.device), self._device[:count])
            if self._host is not None:
                self._host[:count].copy_(self._device[:count], non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()

    def enter(self, starts: torch.Tensor, layers: LayerRange | None = None) -> None:
        count = len(starts)
        span = LayerRange(0, self.pool.layers) if layers is None else layers
        with torch.cuda.stream(self._stream):
            if self._host is not None:
                for run in self.columns(span):
                    part = slice(run.start * self.piece_bytes, run.stop * self.piece_bytes)
                    self._device[:count, part].copy_(self._host[:count, part], non_blocking=True)
            unpack_blocks(self.pool, starts.to(self.pool.device), self._device[:count], span)
            if self._stream is not None:
                self._stream.synchronize()


class Way(NamedTuple):
    """How blocks pass between L1 and the pool, and why so."""

    in_place: bool  # the pool reads and writes L1 itself
    on_device: bool  # else: it reads and writes staging memory on L1's device
    reason: str

    def __str__(self) -> str:
        if self.in_place:
            return f"the pool reads and writes L1 where it lies: {self.reason}"
        where = "on the GPU, registered with UCX" if self.on_device else "in host memory"
        return f"blocks are staged {where}: {self.reason}"


def choose_way(pool: PagedPool, client: PoolClient) -> Way:
    """The shortest way that ``pool`` has."""
    if InPlace.fits(pool):
        return Way(True, False, "it is host memory without gaps")
    if pool.device.type != "cuda":
        return Way(False, False, "L1 is host memory that has gaps, or too many layers for one request")
    if client.no_gpu_memory is not None:
        return Way(False, False, client.no_gpu_memory)
    return Way(False, True, "UCX takes CUDA memory")


def passage(pool: PagedPool, client: PoolClient, way: Way) -> Passage:
    """One direction of ``way``. Raises TransportError."""
    return InPlace(pool, client) if way.in_place else Staged(pool, client, on_device=way.on_device)


def passage_or_host(pool: PagedPool, client: PoolClient, way: Way) -> tuple[Passage, Way]:
    """One direction of ``way``, or of the one through host memory if that has to do.

    UCX that takes CUDA memory may still refuse this GPU's, or as much of it. Raises TransportError.
    """
    try:
        return passage(pool, client, way), way
    except TransportError as error:
        if not way.on_device:
            raise
        way = Way(False, False, str(error))
        return passage(pool, client, way), way


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
