"""Blocks that come through connections part by part, so that the first can be used while the others come."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.pool.blocks import Blocks, Chain, Pieces, Stages, blob
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.requests import Requests, Route, Sent
from polarkv_sglang.transport.messages import MAX_PULL_PARTS, MAX_PULL_RUNS, Pull, Pulled
from polarkv_sglang.transport.stream import Answer, Call

# Of keys in a request that a node is sent while the part before is still on its way: so much fits into a
# socket, whose other end may read nothing until we have read.
_AHEAD_BYTES = 32 << 10


def pull_parts(
    lane: Lane,
    requests: Requests,
    routes: Sequence[Route],
    chain: Chain,
    pieces: Pieces,
    stages: Stages,
    by: float,
) -> list[tuple[Route, Answer]] | None:
    """Have all blocks of a chain sent part by part, by ``by`` (time.monotonic); the answers of the last part.

    Each part is told of once all nodes have sent theirs. None of that once one was lost: then there are no
    answers, or None if nothing was told. None too if not all blocks can come through connections, or
    they would come in too many runs.
    """
    streamed = sum(len(route.blocks) for route in routes if route.link.streamed) == len(chain)
    if not streamed or len(stages.columns) < 2:
        return None
    most_parts, most_keys = max(map(len, stages.columns)), max((len(r.blocks) for r in routes), default=0)
    if most_parts > MAX_PULL_PARTS or most_parts * most_keys > MAX_PULL_RUNS:
        return None
    most_ahead = 2 if len(chain) * KEY_BYTES <= _AHEAD_BYTES else 1
    ahead: deque[list[Sent]] = deque()  # so that a node has the next part to send at once
    last: dict[str, tuple[Route, Answer]] = {}  # by node
    lost, sent, told = False, 0, 0
    try:
        while ahead or not (lost or sent == len(stages.columns)):
            if not lost and sent < len(stages.columns) and len(ahead) < most_ahead:
                build = functools.partial(_pull, chain, pieces, stages.columns[sent])
                ahead.append(requests.send(lane, routes, build, by))
                sent += 1
                continue
            columns = np.r_[tuple(stages.columns[sent - len(ahead)])]
            part = pieces._replace(addresses=np.ascontiguousarray(pieces.addresses[:, columns]))
            calls = [
                (route, Call(route.link.control, message, part.of(route.blocks), sent=True))
                for route, message in ahead[0]
                if isinstance(message, Pull)
            ]
            answers = requests.stream(lane, calls, part.piece_bytes, by, digest=False)
            ahead.popleft()
            now = {route.link.address: (route, answer) for route, answer in answers}
            lost = lost or not _same_blocks(now, last or now, len(chain))
            if not lost:
                last = now
                stages.on_arrival(told)
                told += 1
    finally:
        # Not empty if one of the above has raised: who comes next must not read these answers as its own.
        for route, _ in itertools.chain.from_iterable(ahead):
            requests.fail(lane, route.link, "what it sends was not read: reading was given up")
    if lost:
        return [] if told else None
    return list(last.values())


def _pull(chain: Chain, pieces: Pieces, columns: Sequence[slice], link: Link, blocks: Blocks) -> Pull:
    """A request for some pieces of each of these blocks."""
    size = pieces.piece_bytes
    parts = [(run.start * size, (run.stop - run.start) * size) for run in columns]
    return Pull(
        link.control.next_id(),
        blob(chain.keys, blocks),
        pieces.block_bytes,
        np.array(parts, "<u8").tobytes(),
    )


def _same_blocks(
    now: dict[str, tuple[Route, Answer]], before: dict[str, tuple[Route, Answer]], count: int
) -> bool:
    """Whether ``count`` blocks have come, and none was written anew since the part before."""
    generations = {address: _generations(answer) for address, (_, answer) in now.items()}
    return sum(map(len, generations.values())) == 8 * count and all(
        _generations(before[address][1]) == blob for address, blob in generations.items()
    )


def _generations(answer: Answer) -> bytes:
    return answer.reply.generation_blob if isinstance(answer.reply, Pulled) else b""
