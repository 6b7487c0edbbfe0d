"""The cost policy, and the measured rates that it decides by."""

from __future__ import annotations

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.radix import CostPolicy, Decision, NodeView, Rates
from polarkv_sglang.radix.rates import RateMeter

NODE = NodeView(tokens=1000, kv_bytes=100 << 20)
POLICY = CostPolicy(margin=1.5)


def test_nothing_is_given_up_before_it_is_measured() -> None:
    assert POLICY.decide(NODE, Rates()) is Decision.SPILL
    assert POLICY.decide(NODE, Rates(prefill_tokens_per_s=1e6)) is Decision.SPILL
    assert POLICY.decide(NODE, Rates(pool_bytes_per_s=1.0)) is Decision.SPILL


def test_a_slow_pool_is_not_written_to() -> None:
    # Recomputing takes 0.1 s; the pool brings 100 MiB in 1 s.
    rates = Rates(prefill_tokens_per_s=1e4, pool_bytes_per_s=100 << 20, load_bytes_per_s=10 << 30)
    assert POLICY.decide(NODE, rates) is Decision.KEEP
    assert POLICY.decide(NODE, rates._replace(pool_bytes_per_s=5 << 30)) is Decision.SPILL


def test_what_is_cheaper_to_recompute_than_to_load_is_dropped() -> None:
    rates = Rates(prefill_tokens_per_s=1e4, load_bytes_per_s=100 << 20)
    assert POLICY.decide(NODE, rates) is Decision.DROP


@given(
    st.floats(1, 1e9),
    st.floats(1, 1e12),
    st.floats(1, 1e12),
    st.integers(1, 100_000),
    st.integers(1, 1 << 40),
    st.floats(1.1, 100),
)
def test_a_faster_pool_is_never_used_less(
    prefill: float, pool: float, load: float, tokens: int, kv_bytes: int, faster: float
) -> None:
    worth = [Decision.DROP, Decision.KEEP, Decision.SPILL]
    node = NodeView(tokens, kv_bytes)
    before = POLICY.decide(node, Rates(prefill, pool, load))
    after = POLICY.decide(node, Rates(prefill, pool * faster, load * faster))
    assert worth.index(after) >= worth.index(before)


def test_rates_are_known_once_all_ranks_have_measured_and_then_the_lowest_counts() -> None:
    meter = RateMeter()
    meter.observe_prefill(1000, time.monotonic() - 0.5)
    meter.observe_pool(50 << 20, 0.05)
    meter.agree(lambda values: None, 1024)
    assert meter.agreed.load_bytes_per_s is None
    assert meter.agreed.prefill_tokens_per_s is not None
    assert 1500 < meter.agreed.prefill_tokens_per_s < 2500

    def slower_rank(values: torch.Tensor) -> None:
        values.copy_(torch.minimum(values, torch.tensor([100.0, -1.0, 5.0, -2048.0], dtype=torch.float64)))

    meter.observe_load(10 << 20, 1.0)
    meter.agree(slower_rank, 1024)
    assert meter.agreed == Rates(100.0, None, 5.0)
    assert meter.bytes_per_token == 2048


def test_small_samples_measure_nothing() -> None:
    meter = RateMeter()
    meter.observe_prefill(8, time.monotonic() - 1)
    meter.observe_pool(1000, 1.0)
    meter.observe_load(1000, 1.0)
    meter.agree(lambda values: None, 1024)
    assert meter.agreed == Rates()
