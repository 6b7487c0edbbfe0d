"""The pool itself: over loopback on a memory node of our own, and the nodes that there are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from polarkv_sglang import __version__
from polarkv_sglang.bench.nodes import local_node
from polarkv_sglang.bench.rank import Arena, Rank, a_rank
from polarkv_sglang.bench.throughput import TRANSPORTS
from polarkv_sglang.bench.ucx_tools import offers
from polarkv_sglang.config import format_bytes
from polarkv_sglang.doctor.findings import Facts, Finding, from_error, without_library
from polarkv_sglang.errors import ConfigError, NodeError, PolarError, TransportError
from polarkv_sglang.transport.control import ControlConnection, NodeTimeout
from polarkv_sglang.transport.messages import Peek, Statistics

LOOPBACK_MEND = "look at the checks of UCX and of this host above; polarkv node --log-level debug says more"

_BLOCK_BYTES = 1 << 20
_BLOCKS = 64
_NODE_BLOCKS = 32  # of another's pool: enough for a figure, little to evict
_FEW_BLOCKS = 4  # without figures
_ROUNDS = 3  # after one in which memory is touched for the first time
_LEAST_CAPACITY_BYTES = 64 << 20
_SLOW = 0.25  # of memcpy; shared memory should not be below
_SCARCE_BYTES = 1 << 30  # with less memory than this, few blocks
_DEADLINE_S = 3.0
_PINGS = 20
_UNKNOWN_KEY = bytes(16)


class Rates(NamedTuple):
    """GB/s."""

    put: float
    get: float
    memcpy: float

    def __str__(self) -> str:
        return f"put {self.put:.2f}, get {self.get:.2f} GB/s (memcpy {self.memcpy:.2f})"


def check_loopback(facts: Facts) -> Iterator[Finding]:
    """Put and get, checked byte by byte, for every way that works on this host."""
    if not facts.has_library:
        yield without_library("loopback")
        return
    few = not facts.speed or psutil.virtual_memory().available < _SCARCE_BYTES
    blocks = _FEW_BLOCKS if few else _BLOCKS
    arena = Arena(blocks * _BLOCK_BYTES)
    library = facts.settings.ucx_library
    for transport in _ways(facts):
        ucx_tls, check = TRANSPORTS[transport], f"loopback {transport}"
        # Twice the batch: from the third on, puts evict, and land in memory that is touched already.
        capacity = max(_LEAST_CAPACITY_BYTES, 2 * blocks * _BLOCK_BYTES)
        try:
            with (
                local_node(capacity, ucx_tls=ucx_tls, ucx_library=library) as node,
                a_rank([node.address], arena, token=node.token, ucx_tls=ucx_tls, ucx_library=library) as rank,
            ):
                node.wait_settled()
                rates = _measure(rank, arena, _BLOCK_BYTES, blocks, 1 + _ROUNDS if facts.speed else 1)
        except (NodeError, TransportError) as error:
            yield from_error(check, error, LOOPBACK_MEND)
            continue
        yield _judge(check, transport, rates, blocks, facts.speed)


def _judge(check: str, transport: str, rates: Rates, blocks: int, speed: bool) -> Finding:
    if not speed:
        return Finding(check, "ok", f"{blocks} blocks of {format_bytes(_BLOCK_BYTES)} put and got back")
    if transport == "shm" and min(rates.put, rates.get) < _SLOW * rates.memcpy:
        mend = "see 'same host' and 'huge pages' above and whether the host is busy; polarkv bench tells more"
        return Finding(check, "warning", f"slow: {rates}", mend, rates._asdict())
    return Finding(check, "ok", str(rates), details=rates._asdict())


def check_nodes(facts: Facts) -> Iterator[Finding]:
    """Each node of the pool: reachable, of which version, how far away, how fast."""
    measured = facts.speed and facts.has_library and facts.nodes
    arena = Arena(_NODE_BLOCKS * _BLOCK_BYTES) if measured else None
    for address in facts.nodes:
        try:
            yield _look_at_node(facts, address, arena)
        except (ConfigError, NodeError, TransportError) as error:
            found = from_error(f"node {address}", error, _mend_node(error, address))
            yield found._replace(text=found.text.removeprefix(f"memory node {address} "))


def _mend_node(error: PolarError, address: str) -> str:
    if isinstance(error, NodeTimeout):
        return f"polarkv status {address}; the node may be frozen, or a firewall drops what we send"
    if "over UCX" in str(error):
        return (
            "its control port answers and UCX does not: let UCX's TCP ports through (UCX_TCP_PORT_RANGE "
            "bounds them) and see UCX_NET_DEVICES on both hosts"
        )
    return f"see the node's log; started by: polarkv node --listen {address} --capacity SIZE"


def _ways(facts: Facts) -> list[str]:
    try:
        offered = facts.offered
    except TransportError:
        offered = {}
    return [transport for transport in TRANSPORTS if offers(offered, transport)]


def _measure(rank: Rank, arena: Arena, block_bytes: int, blocks: int, rounds: int) -> Rates:
    """Medians over the rounds after the first; NodeError if anything is not delivered."""
    samples: list[Rates] = []
    for _ in range(rounds):
        [batch] = batches = arena.batches(block_bytes, blocks, 1)
        copy_s = arena.copy(batches)
        arena.wipe(batches)
        seconds = (*rank.put(batches), *rank.get(batches), copy_s)
        arena.verify(batches)
        samples.append(Rates(*(batch.bytes / each / 1e9 for each in seconds)))
    return Rates(*(statistics.median(column) for column in zip(*(samples[1:] or samples))))


def _look_at_node(facts: Facts, address: str, arena: Arena | None) -> Finding:
    """Raises NodeError; writes to the node only if there is an arena."""
    with ControlConnection.connect(
        address,
        token=facts.token,
        tls=facts.tls,
        role="observer",
        client="polarkv doctor",
        deadline_s=_DEADLINE_S,
    ) as control:
        now = control.request(Statistics(control.next_id()), _DEADLINE_S)
        round_trip_ms = 1e3 * _ping_s(control)
        longest_bytes = control.welcome.segment_bytes
    details: dict[str, object] = {
        "version": now.version,
        "libucp": now.libucp,
        "round_trip_ms": round(round_trip_ms, 3),
        "capacity_bytes": now.capacity_bytes,
        "used_bytes": now.used_bytes,
    }
    text = (
        f"up, PolarKV {now.version}, UCX {now.libucp}, {format_bytes(now.used_bytes)} of "
        f"{format_bytes(now.capacity_bytes)} used, round trip {round_trip_ms:.2f} ms"
    )
    if arena is not None:
        settings = facts.settings
        with a_rank(
            [address],
            arena,
            token=facts.token,
            tls=facts.tls,
            ucx_tls=settings.ucx_tls,
            ucx_library=settings.ucx_library,
        ) as rank:
            rates = _measure(rank, arena, min(_BLOCK_BYTES, longest_bytes), _NODE_BLOCKS, 1 + _ROUNDS)
        text += f", {rates}"
        details |= rates._asdict()
    check = f"node {address}"
    if now.version != __version__:
        mend = f"install one version everywhere: this host has PolarKV {__version__}"
        return Finding(check, "warning", text, mend, details)
    return Finding(check, "ok", text, details=details)


def _ping_s(control: ControlConnection) -> float:
    """Median time of the shortest request."""
    samples = []
    for _ in range(_PINGS):
        started = time.perf_counter()
        control.request(Peek(control.next_id(), _UNKNOWN_KEY), _DEADLINE_S)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
