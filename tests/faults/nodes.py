"""Memory nodes in processes of their own that are made to fail, and come back under their address."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.messages import Locate, NodeStatistics, Peek, Release
from tests.support import RunningNode, free_port, running_node


class FaultyNode:
    """A memory node with a fixed address. Leaving its ``with`` kills it."""

    def __init__(
        self,
        capacity: str = "64MiB",
        *,
        tls: str | None = None,
        token: str | None = None,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        """Not started yet."""
        self.address = f"{host}:{free_port()}"
        self._capacity = capacity
        self._flags = () if tls is None else ("--ucx-tls", tls)
        self._token = token
        self._environment = environment
        self._launcher = launcher
        self._log = log
        self._life = contextlib.ExitStack()
        self._running: RunningNode | None = None

    @property
    def running(self) -> RunningNode:
        assert self._running is not None, f"memory node {self.address} is not running"
        return self._running

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def start(self) -> Self:
        """Start it, empty."""
        assert self._running is None
        self._running = self._life.enter_context(
            running_node(
                self._capacity,
                *self._flags,
                token=self._token,
                listen=self.address,
                environment=self._environment,
                launcher=self._launcher,
                log=self._log,
            )
        )
        return self

    def kill(self) -> None:
        """SIGKILL; a frozen one too."""
        self._running = None
        self._life.close()

    def stop(self) -> None:
        """SIGTERM; AssertionError if it does not end well."""
        assert self.running.stop() == 0
        self.kill()

    def freeze(self) -> None:
        self.running.freeze()

    def thaw(self) -> None:
        os.kill(self.running.pid, signal.SIGCONT)

    def statistics(self) -> NodeStatistics:
        return self.running.statistics()

    def wait_until(
        self, condition: Callable[[NodeStatistics], bool], what: str, timeout_s: float = 20.0
    ) -> NodeStatistics:
        """Until its statistics are as wanted; AssertionError if they are not in time."""
        end = time.monotonic() + timeout_s
        while not condition(now := self.statistics()):
            assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s, but {now}"
            time.sleep(0.005)
        return now

    def wait_for(self, counter: str, at_least: int) -> NodeStatistics:
        """Until a counter of its statistics has come so far."""
        return self.wait_until(lambda now: getattr(now, counter) >= at_least, f"{counter} >= {at_least}")

    def wait_for_blocks(self, keys: Sequence[bytes]) -> None:
        """Until it holds all these blocks."""
        self.wait_until(lambda _: self.count(keys) == len(keys), f"it holds {len(keys)} blocks")

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of these blocks are here."""
        with self.running.connect("observer") as control:
            return sum(control.request(Peek(control.next_id(), b"".join(keys)), 5.0).present)

    def flip(self, key: bytes, offset: int) -> bool:
        """Change one byte of a block, at ``offset``; False if the node does not hold the block."""
        with self.running.connect() as control:
            located = control.request(Locate(control.next_id(), key, 5.0), 5.0)
            address = int(unpack_u64(located.address_blob)[0])
            if not located.lease:
                return False
            self.flip_at(address + offset)
            control.send(Release(located.lease))
        return True

    def slab_address(self) -> int:
        """Where the slab begins in the process's memory."""
        with self.running.connect("observer") as control:
            return control.welcome.base_address

    def flip_at(self, address: int) -> None:
        """Change one byte of the process's memory."""
        byte = self.read(address, 1)[0]
        with self._memory("r+b") as memory:
            os.pwrite(memory, bytes([byte ^ 0x40]), address)

    def spoil_blocks(self) -> None:
        """Write bytes over all blocks that are, as numbers, NaN."""
        capacity_bytes, base = self.statistics().capacity_bytes, self.slab_address()
        with self._memory("r+b") as memory:
            os.pwrite(memory, b"\xff" * capacity_bytes, base)

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the process's memory."""
        with self._memory("rb") as memory:
            return os.pread(memory, length, address)

    @contextlib.contextmanager
    def _memory(self, mode: Literal["rb", "r+b"]) -> Iterator[int]:
        with open(f"/proc/{self.running.pid}/mem", mode, buffering=0) as memory:
            yield memory.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
