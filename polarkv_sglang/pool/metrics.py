"""Prometheus metrics of a memory node, read from its statistics whenever they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.transport.messages import NodeStatistics

_GAUGES = {
    "capacity_bytes": "Memory lent to the pool.",
    "used_bytes": "Memory in slots that hold a block or wait for one.",
    "granted_bytes": "Memory in slots that writers on this host have ahead.",
    "blocks": "Blocks that can be read.",
    "reservations": "Writes under way.",
    "leases": "Reads under way that have one, and requests that wait to read.",
    "leased_bytes": "Memory in blocks that these keep from eviction.",
    "quarantined_blocks": "Dropped blocks that are still leased.",
    "notes_bytes": "Memory in notes, beside that lent to the pool.",
    "connections": "Control connections.",
}
_COUNTERS = {
    "hits": "Blocks asked for and found, or read by the directory.",
    "misses": "Blocks asked for and not found.",
    "commits": "Blocks written.",
    "late_commits": "Blocks written to slots that were not the writer's any more, and dropped.",
    "evictions": "Blocks evicted to make room.",
    "corrupt": "Blocks dropped because a reader found a wrong checksum.",
    "sent_blocks": "Blocks sent to clients, through connections or by puts.",
    "sent_bytes": "Bytes of these.",
    "failed_sends": "Blocks that did not reach the client's memory in time.",
    "expired_leases": "Leases that their readers never released.",
    "expired_reservations": "Reservations that their writers never ended.",
    "bad_frames": "Connections closed for breaking the protocol.",
}


class NodeCollector(Collector):
    """Scraped on the HTTP server's threads, so ``statistics`` must be safe to call there."""

    def __init__(self, statistics: Callable[[], NodeStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"polarkv_node_{name}", text, value=getattr(now, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"polarkv_node_{name}", text, value=getattr(now, f"{name}_total"))
        refused = CounterMetricFamily(
            "polarkv_node_refused", "Connections and blocks refused.", labels=["reason"]
        )
        for reason, count in now.refused_total.items():
            refused.add_metric([reason], count)
        yield refused


@contextmanager
def serving_metrics(statistics: Callable[[], NodeStatistics], host: str, port: int) -> Iterator[int]:
    """Serve ``/metrics`` until the block is left; yields the port (0 asks for any). Raises ConfigError."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(statistics))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
