"""Prometheus metrics of an engine's rank, on SGLang's own ``/metrics`` (with ``--enable-metrics``)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from polarkv_sglang.accounting import TokenSources
from polarkv_sglang.pool.client import PoolStatistics


class EngineMetrics:
    """Counters of one process; made once, since prometheus_client refuses a name twice."""

    def __init__(self) -> None:
        # SGLang chooses the multi-process directory at launch: prometheus_client must not be imported before.
        from prometheus_client import Counter, Gauge

        self._tokens = Counter(
            "polarkv_prompt_tokens", "Prompt tokens of finished requests by where they came from.", ["source"]
        )
        self._pool = {
            name: Counter(f"polarkv_pool_{name}", text)
            for name, text in {
                "got_blocks": "Blocks read from the pool with a right checksum.",
                "got_bytes": "Bytes read from the pool.",
                "get_s": "Seconds spent in reads that delivered blocks.",
                "missed_blocks": "Blocks asked for and not delivered.",
                "corrupt_blocks": "Blocks delivered with a wrong checksum, and therefore missed.",
                "put_blocks": "Blocks written to the pool.",
                "put_bytes": "Bytes written to the pool.",
                "put_s": "Seconds spent in writes that stored blocks.",
                "present_blocks": "Blocks offered to the pool that it had already.",
                "failed_batches": "Batches in which a memory node failed.",
            }.items()
        }
        self._live_nodes = Gauge(
            "polarkv_live_nodes", "Memory nodes that the rank can use now.", multiprocess_mode="min"
        )
        self._seen = PoolStatistics(*[0] * len(PoolStatistics._fields))

    def observe_requests(self, finished: Iterable[TokenSources]) -> None:
        """Count the prompts of finished requests."""
        for sources in finished:
            for source, tokens in sources._asdict().items():
                if source != "prompt" and tokens:
                    self._tokens.labels(source).inc(tokens)

    def observe_pool(self, statistics: PoolStatistics, live_nodes: int) -> None:
        """Bring the pool's counters up to ``statistics``."""
        for name, counter in self._pool.items():
            counter.inc(getattr(statistics, name) - getattr(self._seen, name))
        self._seen = statistics
        self._live_nodes.set(live_nodes)


@functools.cache
def engine_metrics() -> EngineMetrics:
    """This process's metrics."""
    return EngineMetrics()
