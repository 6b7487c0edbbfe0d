"""SGLang's device pools (L1) as the blocks of direct mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.hicache.naming import JOINT_LAYOUT, SPLIT_LAYOUT
from polarkv_sglang.kernels.layout import PagedPool

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import KVCache

_WAY_OUT: Final = "use --polarkv-mode hicache"


class DevicePool(NamedTuple):
    """A rank's L1."""

    paged: PagedPool
    layout: str  # of its blocks
    replicated: bool  # every rank of a tensor-parallel group holds the same


def device_pool(kv: KVCache, page_tokens: int) -> DevicePool:
    """L1 as pages and blocks; it keeps the addresses of ``kv``'s tensors, which live as long as the engine.

    SGLang's own resolver for linkers knows no plain MHA and no plain MLA pool, which most models have. Others
    (sliding windows, index keys, scales beside KV) keep state that a block does not hold: ConfigError.
    """
    # Exact types: their subclasses add state of their own.
    if type(kv) is MHATokenToKVPool:
        if kv.k_scale_buffer is not None or kv.native_k_scale_buffer is not None:
            raise ConfigError(f"--polarkv-mode direct: KV with scales beside it is not supported; {_WAY_OUT}")
        return DevicePool(PagedPool.of([kv.k_buffer, kv.v_buffer], page_tokens), SPLIT_LAYOUT, False)
    if type(kv) is MLATokenToKVPool:
        return DevicePool(PagedPool.of([kv.kv_buffer], page_tokens), JOINT_LAYOUT, True)
    raise ConfigError(
        f"--polarkv-mode direct: this model's KV pool is {type(kv).__name__}, and only plain MHA and MLA "
        f"pools are supported; {_WAY_OUT}"
    )
