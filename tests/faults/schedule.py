"""The faults that can befall a pool, and random schedules of them."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator
from types import MappingProxyType
from typing import Final, NamedTuple

from polarkv_sglang.config import parse_address
from polarkv_sglang.transport.control import ControlConnection, NodeRefused
from tests.faults.nodes import FaultyNode
from tests.faults.pool import CAPACITY_BYTES, DEADLINE_S, DYING, FLOOD, Pool

_LASTS_S: Final = (0.2, 2.0)
_QUIET_S: Final = (0.1, 1.0)  # after a fault, before the next
_LEASE_S: Final = (
    4 * DEADLINE_S + 1.5
)  # a client frozen for so long has lost the leases of what it was reading
_FLIPPED_BYTES: Final = 20
_STRANGERS: Final = 20


@contextlib.contextmanager
def _killed(pool: Pool, node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    pool.remember(node)
    node.kill()
    yield
    node.start()


@contextlib.contextmanager
def _stopped(pool: Pool, node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    pool.remember(node)
    node.stop()
    yield
    node.start()


@contextlib.contextmanager
def _frozen(_pool: Pool, node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    node.freeze()
    yield
    node.thaw()


@contextlib.contextmanager
def _frozen_then_killed(pool: Pool, node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    pool.remember(node)
    node.freeze()
    yield
    node.kill()
    node.start()


@contextlib.contextmanager
def _link_down(pool: Pool, _node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    assert pool.link is not None
    pool.link.down()
    yield
    pool.link.up()


@contextlib.contextmanager
def _flipped(_pool: Pool, node: FaultyNode, rng: random.Random) -> Iterator[None]:
    slab = node.slab_address()
    for _ in range(_FLIPPED_BYTES):
        node.flip_at(slab + rng.randrange(CAPACITY_BYTES))
    yield


@contextlib.contextmanager
def _garbage(_pool: Pool, node: FaultyNode, rng: random.Random) -> Iterator[None]:
    for _ in range(_STRANGERS):
        with socket.create_connection(parse_address(node.address), timeout=5.0) as stranger:
            stranger.sendall(rng.randbytes(rng.randint(1, 5000)))
    yield


@contextlib.contextmanager
def _wrong_token(_pool: Pool, node: FaultyNode, _rng: random.Random) -> Iterator[None]:
    for _ in range(_STRANGERS):
        with contextlib.suppress(NodeRefused):
            ControlConnection.connect(
                node.address, token="guessed", role="rank", client="stranger", deadline_s=5.0
            ).close()
            raise AssertionError(f"memory node {node.address} let a wrong token in")
    yield


@contextlib.contextmanager
def _client_killed(pool: Pool, _rng: random.Random) -> Iterator[None]:
    pool.victim.tally()  # raises what it met
    pool.victim.kill()
    yield
    pool.start_victim()


@contextlib.contextmanager
def _client_frozen(pool: Pool, _rng: random.Random) -> Iterator[None]:
    pool.victim.freeze()
    time.sleep(_LEASE_S)
    yield
    pool.victim.thaw()


@contextlib.contextmanager
def _client_killed_in_a_put(pool: Pool, rng: random.Random) -> Iterator[None]:
    writer = pool.client(DYING)
    writer.wait_until(lambda now: now.calls > 0, "it writes")
    time.sleep(rng.uniform(0.0, 0.02))
    writer.kill()
    yield


@contextlib.contextmanager
def _flooded(pool: Pool, _rng: random.Random) -> Iterator[None]:
    assert FLOOD.total_bytes > len(pool.nodes) * CAPACITY_BYTES
    with pool.client(FLOOD) as client:
        yield
        client.stop()


_LINK_DOWN: Final = "link down"
_OF_NODES: Final = MappingProxyType(
    {
        "killed": _killed,
        "stopped": _stopped,
        "frozen": _frozen,
        "frozen, then killed": _frozen_then_killed,
        _LINK_DOWN: _link_down,
        "bytes flipped in the slab": _flipped,
        "garbage on the control port": _garbage,
        "wrong tokens": _wrong_token,
    }
)
_OF_CLIENTS: Final = MappingProxyType(
    {
        "client killed": _client_killed,
        "client frozen": _client_frozen,
        "client killed in a put": _client_killed_in_a_put,
        "pool flooded": _flooded,
    }
)


class Event(NamedTuple):
    """One fault: of some memory nodes at once, or of a client."""

    fault: str
    nodes: tuple[int, ...]  # of the pool's; none for a fault of a client
    lasts_s: float
    quiet_s: float  # after it

    def __str__(self) -> str:
        nodes = " and ".join(str(number + 1) for number in self.nodes)
        return f"{self.fault}{nodes and f', node {nodes}'}, {self.lasts_s:.1f} s"

    def happen(self, pool: Pool, rng: random.Random) -> None:
        """Inject it, wait, and mend it."""
        faults = [_OF_NODES[self.fault](pool, pool.nodes[number], rng) for number in self.nodes]
        if not self.nodes:
            faults.append(_OF_CLIENTS[self.fault](pool, rng))
        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault)
            time.sleep(self.lasts_s)
        time.sleep(self.quiet_s)


def faults(pool: Pool) -> list[str]:
    """What can befall this pool."""
    return [fault for fault in (*_OF_NODES, *_OF_CLIENTS) if fault != _LINK_DOWN or pool.link is not None]


def draw(fault: str, pool: Pool, rng: random.Random) -> Event:
    """An event of that fault; one in five befalls two or all memory nodes at once."""
    numbers = range(len(pool.nodes))
    if fault in _OF_CLIENTS:
        nodes: list[int] = []
    elif fault == _LINK_DOWN:
        nodes = [numbers[-1]]
    else:
        nodes = sorted(rng.sample(numbers, rng.choice([1] * 8 + [2, 3])))
    return Event(fault, tuple(nodes), rng.uniform(*_LASTS_S), rng.uniform(*_QUIET_S))
