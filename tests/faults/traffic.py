"""Clients of the pool whose every byte is known beforehand, so that any wrong one is found.

``Traffic`` runs in threads of this process, ``TrafficProcess`` in a process that can be frozen and killed;
``python -m tests.faults.traffic`` is what it starts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import msgspec
import numpy as np
import numpy.typing as npt

from polarkv_sglang.pool.blocks import Chain, Pieces, chain
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport import DRAIN_S
from tests.support import freeze

Kind = Literal["get", "put", "peek"]

PIECES = 2  # K and V
STRIPE_PAGES = 8
SLACK_S = 0.5  # what two busy cores may add to a deadline
_UNTOUCHED = 0xA5A5A5A5A5A5A5A5
_START_S, _STOP_S, _REPORT_S = 30.0, 20.0, 20.0


class WrongBytes(AssertionError):
    """A block that the pool said was there is not what was put, or memory changed after a read had ended."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a client does. Clients of one ``name`` and ``piece_bytes`` read and write the same blocks."""

    name: str = "load"
    prompts: int = 8
    pages: int = 32  # of a prompt
    piece_bytes: int = 32 << 10
    kinds: tuple[Kind, ...] = ("get", "put", "peek")  # a thread for each
    pause_s: float = 0.001  # between two calls of a thread
    deadline_s: float = 0.5
    may_freeze: bool = False  # the client itself, so that its calls may take any time
    ucx_tls: str | None = None
    token: str | None = None
    seed: int = 0

    @property
    def block_bytes(self) -> int:
        return PIECES * self.piece_bytes

    @property
    def total_bytes(self) -> int:
        """Of all blocks."""
        return self.prompts * self.pages * self.block_bytes

    @property
    def longest_call_s(self) -> float:
        """What no call may exceed, whatever the memory nodes do."""
        if self.may_freeze:
            return float("inf")
        return self.deadline_s + DRAIN_S + SLACK_S

    @property
    def heads(self) -> list[bytes]:
        """The key of the first page of each prompt."""
        return self.all_keys[:: self.pages]

    @property
    def all_keys(self) -> list[bytes]:
        """Keys of all pages, prompt by prompt."""
        pages = itertools.product(range(self.prompts), range(self.pages))
        names = (f"{self.name} {self.piece_bytes} {prompt} {page}" for prompt, page in pages)
        return [hashlib.sha256(name.encode()).digest()[:16] for name in names]


class Tally(msgspec.Struct):
    """What a client met so far."""

    calls: int = 0
    hit_blocks: int = 0  # read, and right to the last byte
    missed_blocks: int = 0
    stored_blocks: int = 0  # put, or there already
    refused_blocks: int = 0
    corrupt_blocks: int = 0  # read with a wrong checksum, and therefore missed
    failed_batches: int = 0  # in which a memory node failed
    slowest_s: float = 0.0
    live: list[str] = []  # memory nodes in use now


class Rank:
    """A pool client whose blocks hold what their keys say: each 16 bytes are the key, under a fixed mask."""

    def __init__(self, load: Load, *nodes: str) -> None:
        """Connects in the background."""
        self.load = load
        self.tally = Tally()
        self._keys = load.all_keys
        shape = (PIECES, load.pages, load.piece_bytes // 16, 2)
        mask = np.random.default_rng(0).integers(0, 2**64, (PIECES, 1, *shape[2:]), np.uint64)
        self._mask = mask
        self._outgoing = np.zeros(shape, np.uint64)
        # A read into one of them has long returned when the other is checked for late writes.
        self._incoming = [np.full(shape, _UNTOUCHED, np.uint64) for _ in range(2)]
        self.client = PoolClient(
            nodes,
            token=load.token,
            deadline_s=load.deadline_s,
            client=f"{load.name} {load.seed}",
            ucx_tls=load.ucx_tls,
        )
        for buffer in (self._outgoing, *self._incoming):
            self.client.register(buffer.ctypes.data, buffer.nbytes)

    def get(self, prompt: int, start: int, end: int) -> int:
        """Read pages into fresh memory, check every byte; how many were hits. Raises WrongBytes."""
        self._incoming.reverse()
        buffer = self._incoming[0]
        if (buffer != _UNTOUCHED).any():
            raise WrongBytes("the memory of a read changed after the read had returned")
        with self._timed():
            got = self.client.get(self._chain(prompt, start, end), self._pieces(buffer, end - start))
        right = (buffer[:, : end - start] == self._content(prompt, start, end)).all(axis=(0, 2, 3))
        if (got & ~right).any():
            pages = (start + np.flatnonzero(got & ~right)).tolist()
            raise WrongBytes(f"pages {pages} of prompt {prompt} were read wrong and taken for right")
        buffer[:] = _UNTOUCHED
        self.tally.hit_blocks += int(got.sum())
        self.tally.missed_blocks += int((~got).sum())
        return int(got.sum())

    def put(self, prompt: int, start: int, end: int) -> int:
        """Write pages; how many the pool has now, or is getting from another."""
        self._outgoing[:, : end - start] = self._content(prompt, start, end)
        with self._timed():
            put = self.client.put(self._chain(prompt, start, end), self._pieces(self._outgoing, end - start))
        self.tally.stored_blocks += int(put.sum())
        self.tally.refused_blocks += int((~put).sum())
        return int(put.sum())

    def peek(self, prompt: int, start: int, end: int) -> int:
        """How many pages at the head are in the pool."""
        with self._timed():
            present = self.client.peek(self._chain(prompt, start, end))
        assert 0 <= present <= end - start
        return present

    def report(self) -> Tally:
        """The tally now."""
        statistics = self.client.statistics()
        self.tally.corrupt_blocks = int(statistics.corrupt_blocks)
        self.tally.failed_batches = int(statistics.failed_batches)
        self.tally.live = sorted(self.client.membership.live)
        return msgspec.structs.replace(self.tally)

    def close(self) -> None:
        """Leave the pool; no call may be under way."""
        self.client.close()

    def __enter__(self) -> Self:
        """Once all memory nodes were tried."""
        assert self.client.membership.wait_tried(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - started)
        self.tally.calls += 1

    def _chain(self, prompt: int, start: int, end: int) -> Chain:
        first = prompt * self.load.pages
        return chain(self._keys[first : first + start], self._keys[first + start : first + end], STRIPE_PAGES)

    def _content(self, prompt: int, start: int, end: int) -> npt.NDArray[np.uint64]:
        first = prompt * self.load.pages
        words = np.frombuffer(b"".join(self._keys[first + start : first + end]), np.uint64)
        return self._mask ^ words.reshape(1, end - start, 1, 2)

    def _pieces(self, buffer: npt.NDArray[np.uint64], count: int) -> Pieces:
        piece, block = buffer.strides[:2]
        offsets = np.arange(count)[:, None] * block + np.arange(PIECES)[None, :] * piece
        return Pieces((buffer.ctypes.data + offsets).astype(np.uint64), self.load.piece_bytes)


class Traffic:
    """A rank that reads, writes and looks, each in a thread of its own, until it is stopped.

    A wrong byte or an exception ends it; ``tally``, ``wait_until`` and ``stop`` raise that.
    """

    def __init__(self, load: Load, *nodes: str) -> None:
        self.load = load
        self._rank = Rank(load, *nodes)
        self._stop = threading.Event()
        self._called = threading.Condition()
        self._threads = concurrent.futures.ThreadPoolExecutor(len(load.kinds), load.name)
        self._running = [self._threads.submit(self._repeat, kind) for kind in load.kinds]

    def tally(self) -> Tally:
        """What happened so far; raises what ended a thread."""
        for thread in self._running:
            if thread.done():
                thread.result()
        return self._rank.report()

    def wait_until(self, condition: Callable[[Tally], bool], what: str, timeout_s: float = 20.0) -> Tally:
        """Until the tally is as wanted; AssertionError if it is not in time."""
        end = time.monotonic() + timeout_s
        with self._called:
            while not condition(tally := self.tally()):
                left_s = end - time.monotonic()
                assert left_s > 0, f"{what}: not within {timeout_s:g} s, but {tally}"
                self._called.wait(left_s)
        return tally

    def wait_for_hits(self, count: int = 200) -> Tally:
        """Until that many more blocks were hits."""
        before = self.tally().hit_blocks
        return self.wait_until(lambda now: now.hit_blocks >= before + count, "reads find blocks")

    def wait_for_nodes(self, *live: str) -> Tally:
        """Until exactly these memory nodes are in use."""
        return self.wait_until(lambda now: now.live == sorted(live), f"the nodes in use are {live}")

    def stop(self) -> Tally:
        """End the threads and leave the pool; the tally. Raises what ended a thread before."""
        self._stop.set()
        concurrent.futures.wait(self._running)
        tally = self._rank.report()
        self._threads.shutdown()
        self._rank.close()
        for thread in self._running:
            thread.result()
        assert tally.slowest_s < self.load.longest_call_s, (
            f"a call took {tally.slowest_s:.2f} s, more than {self.load.longest_call_s:.2f} s"
        )
        return tally

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _repeat(self, kind: Kind) -> None:
        rng = random.Random(f"{self.load.seed} {kind}")
        call = {"get": self._rank.get, "put": self._rank.put, "peek": self._rank.peek}[kind]
        try:
            while not self._stop.is_set():
                prompt = rng.randrange(self.load.prompts)
                end = rng.randint(1, self.load.pages)
                # As an engine does, which asks for the pages after those that it has.
                start = rng.choice([0, 0, rng.randrange(end)])
                call(prompt, start, end)
                with self._called:
                    self._called.notify_all()
                self._stop.wait(self.load.pause_s)
        finally:
            self._stop.set()  # one that fails ends the others
            with self._called:
                self._called.notify_all()


class TrafficProcess:
    """Traffic in a process of its own."""

    def __init__(
        self, load: Load, *nodes: str, launcher: Sequence[str] = (), log: Path | None = None
    ) -> None:
        """``launcher`` and ``log``: as for ``running_node``."""
        self.load = load
        command = [*launcher, sys.executable, "-m", "tests.faults.traffic"]
        command += [msgspec.json.encode(load).decode(), *nodes]
        with contextlib.nullcontext() if log is None else log.open("a") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        self._read_tally(_START_S)

    @property
    def pid(self) -> int:
        return self.process.pid

    def tally(self) -> Tally:
        """What happened so far; AssertionError if the process has ended or does not answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._read_tally(_REPORT_S)

    def wait_until(self, condition: Callable[[Tally], bool], what: str, timeout_s: float = 20.0) -> Tally:
        """Until the tally is as wanted; AssertionError if it is not in time."""
        end = time.monotonic() + timeout_s
        while not condition(tally := self.tally()):
            assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s, but {tally}"
            time.sleep(0.02)
        return tally

    def wait_for_hits(self, count: int = 200) -> Tally:
        """Until that many more blocks were hits."""
        before = self.tally().hit_blocks
        return self.wait_until(lambda now: now.hit_blocks >= before + count, "reads find blocks")

    def wait_for_nodes(self, *live: str) -> Tally:
        """Until exactly these memory nodes are in use."""
        return self.wait_until(lambda now: now.live == sorted(live), f"the nodes in use are {live}")

    def freeze(self) -> None:
        freeze(self.process.pid)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; a frozen process too."""
        with self.process:
            self.process.kill()

    def stop(self) -> Tally:
        """End it; its last tally. AssertionError if it met a wrong byte or an exception."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        tally = self._read_tally(_STOP_S)
        assert self.process.wait(_STOP_S) == 0
        return tally

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _read_tally(self, timeout_s: float) -> Tally:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the client's process gave no answer; exit code {self.process.poll()}"
        return msgspec.json.decode(line, type=Tally)


def main() -> None:
    """Traffic until the end of input; prints its tally at the start, for each line of input, and at the end.

    Ends with a traceback, and no tally, if the traffic met a wrong byte or an exception.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where UCX complains
    traffic = Traffic(msgspec.json.decode(sys.argv[1], type=Load), *sys.argv[2:])

    def show(tally: Tally) -> None:
        answers.write(msgspec.json.encode(tally) + b"\n")

    show(traffic.tally())
    for _ in sys.stdin:
        show(traffic.tally())
    show(traffic.stop())


if __name__ == "__main__":
    main()
