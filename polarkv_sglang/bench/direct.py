"""How well direct mode hides a load behind the forward pass that needs it."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from polarkv_sglang.bench.nodes import local_node
from polarkv_sglang.bench.throughput import TRANSPORTS
from polarkv_sglang.errors import NodeError
from polarkv_sglang.hicache.loader import Loader
from polarkv_sglang.hicache.staging import Passage, choose_way, passage
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.kernels.layout import PagedPool
from polarkv_sglang.pool.blocks import Chain, chain
from polarkv_sglang.pool.client import PoolClient

PAGE_TOKENS = 64
LAYERS = 32
_TOKEN_BYTES = 1024  # of K, and of V, in one layer: 4 heads of 128 in half precision
_STRIPE_PAGES = 32
_DEADLINE_S = 5.0  # what an engine may be given at most


class Overlap(NamedTuple):
    """One restored prefix; seconds."""

    transport: str
    layers: int
    bytes: int
    layer_s: float  # that a layer of the forward pass computes for
    transfer_s: float  # the load alone
    compute_s: float  # the forward pass alone
    ttft_s: float  # both at once, each layer waiting for its KV
    sequential_s: float  # the load, then the forward pass
    arrived_s: list[float]  # per layer, since the load began, when its KV was there
    needed_s: list[float]  # and when the forward pass asked for it

    @property
    def overlap_efficiency(self) -> float:
        """1 at best, where the shorter of the two costs nothing."""
        return self.ttft_s / max(self.transfer_s, self.compute_s)


def measure(
    transport: str, pages: int, layer_s: float | None, repeats: int, ucx_library: str | None = None
) -> list[Overlap]:
    """``repeats`` restores of a prefix of ``pages`` pages, over one transport to a memory node on this host.

    A layer computes for ``layer_s``; None: as long as its KV takes to arrive, where overlap matters most.
    Computing is waiting, as the host does while a GPU computes. Raises NodeError and TransportError.
    """
    slots = (pages + 1) * PAGE_TOKENS
    buffers = [[torch.zeros(slots, 1, _TOKEN_BYTES, dtype=torch.uint8) for _ in range(LAYERS)] for _ in "KV"]
    pool = PagedPool.of(buffers, PAGE_TOKENS)
    ucx_tls, token = TRANSPORTS[transport], secrets.token_hex(16)
    capacity = max(64 << 20, 2 * pages * pool.block_bytes)
    with local_node(capacity, token=token, ucx_tls=ucx_tls, ucx_library=ucx_library) as node:
        client = PoolClient(
            (node.address,), token=token, deadline_s=_DEADLINE_S, ucx_tls=ucx_tls, ucx_library=ucx_library
        )
        try:
            client.membership.wait_tried(_DEADLINE_S)
            way = passage(pool, client, choose_way(pool, client))
            starts = torch.randperm(pages) * PAGE_TOKENS
            blocks = _written(client, way, buffers, starts)
            each = layer_s or 0.0
            loader = Loader(client, way, lambda: each)
            _run(loader, blocks, starts, None)  # groups follow from what a load has taken
            rows = []
            for _ in range(repeats):
                transfer_s = _run(loader, blocks, starts, None).ttft_s
                each = transfer_s / LAYERS if layer_s is None else layer_s
                compute_s = _compute(each, lambda layer: None)
                both = _run(loader, blocks, starts, each)
                rows.append(
                    Overlap(
                        transport,
                        LAYERS,
                        pages * pool.block_bytes,
                        each,
                        transfer_s,
                        compute_s,
                        both.ttft_s,
                        transfer_s + compute_s,
                        both.arrived_s,
                        both.needed_s,
                    )
                )
            return rows
        finally:
            client.close()


def _written(
    client: PoolClient, way: Passage, buffers: list[list[torch.Tensor]], starts: torch.Tensor
) -> Chain:
    for part in buffers:
        for layer in part:
            layer.random_(0, 256)
    blob = os.urandom(KEY_BYTES * len(starts))
    blocks = chain([], [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)], _STRIPE_PAGES)
    way.leave(starts)
    if not client.put(blocks, way.pieces(starts)).all():
        raise NodeError("; ".join(client.membership.reasons().values()) or "a put was not finished in time")
    return blocks


class _Run(NamedTuple):
    ttft_s: float
    arrived_s: list[float]
    needed_s: list[float]


def _run(loader: Loader, blocks: Chain, starts: torch.Tensor, layer_s: float | None) -> _Run:
    """A load, and with ``layer_s`` the forward pass beside it."""
    ready = [threading.Event() for _ in range(LAYERS)]
    arrived, needed = [0.0] * LAYERS, [0.0] * LAYERS
    landed: list[bool] = []
    started = time.perf_counter()

    def release(up_to: int) -> None:
        for layer in range(up_to):
            if not ready[layer].is_set():
                arrived[layer] = time.perf_counter() - started
                ready[layer].set()

    def load() -> None:
        landed.append(loader.load(blocks, starts, release))
        release(LAYERS)

    def wait(layer: int) -> None:
        needed[layer] = time.perf_counter() - started
        ready[layer].wait()

    thread = threading.Thread(target=load, name="load")
    thread.start()
    if layer_s is not None:
        _compute(layer_s, wait)
    thread.join()  # the check of whole blocks comes last, and the output waits for it
    took = time.perf_counter() - started
    if not landed[0]:
        raise NodeError("a load was not finished in time; give fewer --pages")
    return _Run(took, arrived, needed)


def _compute(layer_s: float, wait: Callable[[int], None]) -> float:
    started = time.perf_counter()
    for layer in range(LAYERS):
        wait(layer)
        time.sleep(layer_s)
    return time.perf_counter() - started
