"""A memory node's index: how fast one client finds blocks, and what a block costs the node in memory."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from polarkv_sglang.bench.figures import Figure
from polarkv_sglang.bench.nodes import LocalNode, local_node
from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import KEY_BYTES, NO_PARENT
from polarkv_sglang.pool.slab import PAGE_BYTES, default_segment_bytes
from polarkv_sglang.transport.control import ControlConnection, answers
from polarkv_sglang.transport.messages import MAX_KEYS, Commit, Locate, Located, Release, Reserve, Statistics

BATCH_KEYS = 128  # what SGLang asks its storage for at once

_DEADLINE_S = 30.0
_LEASE_S = 5.0
_BATCHES_A_SAMPLE = 2000
_WINDOW = 16  # requests under way when pipelined
_PROMPT_BYTES = BATCH_KEYS * KEY_BYTES


class IndexFigures(NamedTuple):
    blocks: int
    bytes_per_block: float  # growth of the node's memory outside the slab
    keys_per_s: Figure  # found and leased, one batch at a time
    pipelined_keys_per_s: Figure  # the same with _WINDOW batches under way


def measure(blocks: int, repeats: int, ucx_library: str | None = None) -> IndexFigures:
    """Fill the index of a fresh memory node and ask it for whole prompts, in random order.

    The slab is reserved, not touched: blocks are committed without having been written. NodeError if the
    node does not start, fails, or misses a key.
    """
    prompts = max(2, -(-blocks // BATCH_KEYS))
    capacity = prompts * BATCH_KEYS * PAGE_BYTES
    capacity += 2 * default_segment_bytes(capacity)
    with local_node(capacity, "--no-prefault", ucx_library=ucx_library) as node, _connect(node) as control:
        control.start_streaming(_DEADLINE_S)  # as a rank's look-ups
        keys = os.urandom(_PROMPT_BYTES * prompts)
        _write(control, keys[:_PROMPT_BYTES])  # what the first write costs is no block's
        before = _own_bytes(node)
        _write(control, keys[_PROMPT_BYTES:])
        grown = _own_bytes(node) - before
        samples: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for pipelined in samples:
                samples[pipelined].append(_keys_per_s(control, keys, pipelined))
        with _connect(node) as observer:
            _check(observer, prompts, repeats)
    one_by_one, pipelined_figure = Figure.of(samples[False]), Figure.of(samples[True])
    assert one_by_one is not None
    assert pipelined_figure is not None
    return IndexFigures(
        prompts * BATCH_KEYS, grown / ((prompts - 1) * BATCH_KEYS), one_by_one, pipelined_figure
    )


def _connect(node: LocalNode) -> ControlConnection:
    return ControlConnection.connect(
        node.address, token=node.token, role="rank", client="polarkv bench", deadline_s=_DEADLINE_S
    )


def _own_bytes(node: LocalNode) -> int:
    """Resident memory of the node's process without what it shares: the slab, and files that are mapped."""
    for line in Path(f"/proc/{node.pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.removesuffix("kB")) << 10
    raise NodeError(f"/proc/{node.pid}/status does not tell RssAnon; run on Linux 4.5 or later")


def _write(control: ControlConnection, keys: bytes) -> None:
    """Reserve and commit blocks; in prompts of BATCH_KEYS pages."""
    step = MAX_KEYS // BATCH_KEYS * _PROMPT_BYTES
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        count = len(part) // KEY_BYTES
        parents = b"".join(
            NO_PARENT + part[prompt : prompt + _PROMPT_BYTES - KEY_BYTES]
            for prompt in range(0, len(part), _PROMPT_BYTES)
        )
        reserved = control.request(Reserve(control.next_id(), part, parents, PAGE_BYTES), _DEADLINE_S)
        commit = Commit(control.next_id(), reserved.reservation, b"\1" * count, bytes(8 * count))
        committed = control.request(commit, _DEADLINE_S).count
        if committed != count:
            raise NodeError(f"memory node {control.address} took {committed} of {count} blocks")


def _keys_per_s(control: ControlConnection, keys: bytes, pipelined: bool) -> float:
    window = _WINDOW if pipelined else 1
    prompts = _random_prompts(keys)
    under_way: deque[Locate] = deque()
    started = time.perf_counter()
    for number in range(_BATCHES_A_SAMPLE + window):
        if number >= window:
            request = under_way.popleft()
            reply = control.receive(time.monotonic() + _DEADLINE_S)
            if not (isinstance(reply, Located) and answers(reply, request)):
                raise NodeError(f"memory node {control.address} did not answer Locate properly")
            control.send(Release(reply.lease))
        if number < _BATCHES_A_SAMPLE:
            under_way.append(Locate(control.next_id(), next(prompts), _LEASE_S))
            control.send(under_way[-1])
    return _BATCHES_A_SAMPLE * BATCH_KEYS / (time.perf_counter() - started)


def _random_prompts(keys: bytes) -> Iterator[bytes]:
    """For ever, in strides: neighbours in memory are not asked for one after the other."""
    count = len(keys) // _PROMPT_BYTES
    position = 0
    while True:
        position = (position + 7919) % count
        yield keys[position * _PROMPT_BYTES : (position + 1) * _PROMPT_BYTES]


def _check(control: ControlConnection, prompts: int, repeats: int) -> None:
    """NodeError unless every key that was asked for was found."""
    now = control.request(Statistics(control.next_id()), _DEADLINE_S)
    asked = 2 * repeats * _BATCHES_A_SAMPLE * BATCH_KEYS
    if (now.blocks, now.hits_total, now.misses_total) != (prompts * BATCH_KEYS, asked, 0):
        raise NodeError(
            f"memory node {control.address} holds {now.blocks} of {prompts * BATCH_KEYS} blocks "
            f"and found {now.hits_total} of {asked} keys"
        )
