"""Models whose KV a block would not hold whole are refused when the engine starts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.hicache.device_pools import device_pool
from polarkv_sglang.hicache.linker import PolarLinker

PAGE_TOKENS = 16


class PoolWithMore(MHATokenToKVPool):
    """As SGLang's pools of some models, which keep state of their own beside K and V."""


def a_pool(kind: type[MHATokenToKVPool] = MHATokenToKVPool) -> MHATokenToKVPool:
    return kind(
        size=64,
        page_size=PAGE_TOKENS,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=64,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


def test_a_pool_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"PoolWithMore.*use --polarkv-mode hicache"):
        device_pool(a_pool(PoolWithMore), PAGE_TOKENS)


@pytest.mark.parametrize("scales", ["k_scale_buffer", "native_k_scale_buffer"])
def test_scales_beside_kv_are_refused(scales: str) -> None:
    pool = a_pool()
    device_pool(pool, PAGE_TOKENS)
    setattr(pool, scales, [torch.ones(64)])
    with pytest.raises(ConfigError, match=r"scales beside it.*use --polarkv-mode hicache"):
        device_pool(pool, PAGE_TOKENS)


@pytest.mark.parametrize("more", [ComponentType.SWA, ComponentType.MAMBA])
def test_state_beside_full_attention_is_refused(more: ComponentType) -> None:
    nothing = cast("Any", None)  # what a model needs is known before anything else is
    with pytest.raises(ConfigError, match=rf"keeps FULL, {more.name} state.*use --polarkv-mode hicache"):
        PolarLinker(nothing, nothing, components=(ComponentType.FULL, more))
