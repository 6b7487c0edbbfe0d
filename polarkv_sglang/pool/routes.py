"""Which memory node each block of a chain is asked of, and moving blocks between them and this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.blocks import Blocks, Chain, Pieces
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.placement import ranking
from polarkv_sglang.pool.requests import Requests, Route
from polarkv_sglang.transport import Direction


class Part(NamedTuple):
    """Blocks of a chain and where they lie in one memory node."""

    link: Link
    blocks: Blocks
    addresses: npt.NDArray[np.uint64]


class Moved(NamedTuple):
    """What became of the blocks of a chain in one transfer."""

    arrived: npt.NDArray[np.bool_]  # [chain]
    checksums: npt.NDArray[np.uint64]  # [chain]; undefined where not arrived


def usable_nodes(lane: Lane, live: Mapping[str, int]) -> Mapping[str, int]:
    """Address -> capacity of the nodes that a lane can use: what the blocks of a batch are placed over."""
    if live.keys() <= lane.links.keys():
        return live
    return {address: size for address, size in live.items() if address in lane.links}


def route_blocks(
    lane: Lane, nodes: Mapping[str, int], chain: Chain, blocks: Blocks, place: int = 0
) -> list[Route]:
    """``blocks`` of the chain by the link to the one of ``nodes`` at ``place`` of their stripe's ranking.

    Blocks for which there is no such node, or none any more, are left out.
    """
    if place >= len(nodes) or not len(blocks):
        return []
    if len(nodes) == 1:
        link = lane.links.get(next(iter(nodes)))
        return [Route(link, blocks)] if link is not None else []
    homes: dict[bytes, str] = {}
    by_node: dict[str, list[int]] = {}
    for block in blocks.tolist():
        anchor = chain.anchors[block]
        node = homes.get(anchor)
        if node is None:
            node = homes[anchor] = ranking(anchor, nodes, place + 1)[place]
        by_node.setdefault(node, []).append(block)
    return [
        Route(lane.links[node], np.array(positions))
        for node, positions in by_node.items()
        if node in lane.links
    ]


def move(
    lane: Lane,
    direction: Direction,
    memory: LocalMemory,
    pieces: Pieces,
    parts: Sequence[Part],
    deadline: float,
    requests: Requests,
    *,
    digest: bool = True,
    digests: npt.NDArray[np.uint64] | None = None,
) -> Moved:
    """Move blocks between ``pieces`` and memory nodes by ``deadline``; links that fail are given up.

    Without ``digest`` there are no checksums; ``digests`` ([chain, chunks of a block]) receives those of
    the chunks of blocks that arrived, and zeros for those that were asked for and did not.
    """
    moved = Moved(np.zeros(len(pieces.addresses), bool), np.zeros(len(pieces.addresses), np.uint64))
    # A link may have been given up since it answered.
    parts = [part for part in parts if len(part.blocks) and lane.links.get(part.link.address) is part.link]
    parts = [part for part in parts if part.link.route is not None]
    if not parts or lane.worker is None:
        return moved
    blocks = np.concatenate([part.blocks for part in parts])
    by_processor = pieces.checksums is None
    chunks = None if digests is None else np.zeros((len(blocks), digests.shape[1]), np.uint64)
    try:
        done = lane.worker.transfer(
            direction,
            [part.link.route for part in parts if part.link.route is not None],
            np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part.blocks) for part in parts]),
            np.concatenate([part.addresses for part in parts]),
            pieces.addresses[blocks],
            pieces.piece_bytes,
            memory.regions.memories,
            max(0.0, deadline - time.monotonic()),
            digest=digest and by_processor,
            digests=chunks,
            iov=by_processor,
        )
    except TransportError:
        if not lane.worker.statistics().poisoned:
            raise
        requests.replace_worker(lane)
        return moved
    moved.arrived[blocks] = done.status == 0
    if digests is not None and chunks is not None:
        digests[blocks] = chunks
    computed = pieces.checksums(blocks) if digest and pieces.checksums is not None else done.checksums
    moved.checksums[blocks] = computed
    for part in parts:
        if part.link.failed is not None:
            requests.fail(lane, part.link, part.link.failed)
    return moved
