"""Groups of layers: a pass waits for a small first one, and then no more where it computes longer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.hicache.groups import layer_groups
from polarkv_sglang.kernels.layout import LayerRange

LAYERS = st.integers(1, 100)
SECONDS = st.floats(1e-6, 1e-1)


def waits(groups: list[LayerRange], transfer_s: float, compute_s: float) -> list[float]:
    """Seconds that the forward pass waits for each group."""
    arrived = computed = 0.0
    waited = []
    for group in groups:
        arrived += len(group) * transfer_s
        waited.append(max(0.0, arrived - computed))
        computed = max(computed, arrived) + len(group) * compute_s
    return waited


@given(LAYERS, st.floats(0, 1), st.floats(0, 1))
def test_every_layer_is_in_one_group_in_order(layers: int, transfer_s: float, compute_s: float) -> None:
    groups = layer_groups(layers, transfer_s, compute_s)
    assert [layer for group in groups for layer in range(*group)] == list(range(layers))
    assert all(len(group) for group in groups)


@given(LAYERS, SECONDS, st.floats(1.5, 1000))
def test_a_pass_that_computes_longer_waits_for_the_first_group_only(
    layers: int, transfer_s: float, ratio: float
) -> None:
    groups = layer_groups(layers, transfer_s, ratio * transfer_s)
    first, *later = waits(groups, transfer_s, ratio * transfer_s)
    assert first <= max(1.0e-3 + transfer_s, transfer_s)
    assert sum(later) <= 1e-9 * layers


@given(LAYERS, SECONDS, st.floats(0, 1))
def test_where_layers_come_more_slowly_little_is_computed_after_the_last(
    layers: int, transfer_s: float, ratio: float
) -> None:
    groups = layer_groups(layers, transfer_s, ratio * transfer_s)
    assert len(groups[-1]) * transfer_s <= 1e-3 + transfer_s


def test_groups_grow_with_what_is_computed_meanwhile() -> None:
    sizes = [len(group) for group in layer_groups(64, 1e-3, 4e-3)]
    assert sizes[:3] == [1, 3, 9]
    assert [len(group) for group in layer_groups(6, 2e-3, 0.0)] == [1] * 6
    assert [len(group) for group in layer_groups(32, 1e-4, 0.0)] == [10, 10, 10, 2]
