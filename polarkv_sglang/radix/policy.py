"""What becomes of a tree node's KV: policies suggest, the cache carries out and may refuse."""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol


class Decision(enum.Enum):
    """Where a node's KV is worth keeping."""

    SPILL = "spill"  # also in the pool
    KEEP = "keep"  # on this engine only, as long as there is room
    DROP = "drop"  # nowhere, once it must leave L1


class NodeView(NamedTuple):
    """A tree node as a policy sees it; equal on all ranks."""

    tokens: int
    kv_bytes: int  # of the rank that holds most per token


class Rates(NamedTuple):
    """Measured speeds that all ranks agreed on; None until measured."""

    prefill_tokens_per_s: float | None = None
    pool_bytes_per_s: float | None = None  # L3 -> L2, of one rank
    load_bytes_per_s: float | None = None  # L2 -> L1, of one rank; measured where the device times copies


class SpillPolicy(Protocol):
    """Decides per node. Every rank calls it with equal arguments: be deterministic."""

    def decide(self, node: NodeView, rates: Rates) -> Decision: ...


class CostPolicy:
    """Keep KV only where bringing it back is cheaper than computing it again.

    Compares recompute time at the measured prefill rate with transfer time at the measured bandwidth.
    Attention makes late tokens of a long prompt dearer than the mean, so it errs towards SPILL for short
    prefixes and towards DROP for long ones by the same factor; ``margin`` absorbs that and the noise.

    Does not help before both sides are measured (it then spills everything), nor where the pool is full
    of better blocks: what to evict there is the memory node's policy.
    """

    def __init__(self, margin: float = 1.5) -> None:
        """A tier is given up only if fetching from it takes ``margin`` times as long as recomputing."""
        self._margin = margin

    def decide(self, node: NodeView, rates: Rates) -> Decision:
        if rates.prefill_tokens_per_s is None:
            return Decision.SPILL
        limit_s = self._margin * node.tokens / rates.prefill_tokens_per_s
        if _seconds(node.kv_bytes, rates.load_bytes_per_s) > limit_s:
            return Decision.DROP
        # What comes from the pool has to pass through L2 as well.
        way_s = _seconds(node.kv_bytes, rates.pool_bytes_per_s) + _seconds(
            node.kv_bytes, rates.load_bytes_per_s
        )
        return Decision.KEEP if way_s > limit_s else Decision.SPILL


def _seconds(count: int, bytes_per_s: float | None) -> float:
    return 0.0 if bytes_per_s is None else count / bytes_per_s
