"""What SGLang needs changed to run attention and HiCache on our platform."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import psutil

from polarkv_sglang.compat import Surface, check_surfaces

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.pool_host.base import HostKVCache
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

_REQUESTS: Final = ("req_to_token", "req_pool_indices", "seq_lens")
_OPTIONS: Final = ("encoder_lens", "scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")
_TENSORS: Final = ("query", "output", "k_cache", "v_cache")
_LOAD: Final = ("host_indices", "device_indices", "layer_id", "io_backend")
_BACKUP: Final = ("host_indices", "device_indices", "io_backend")

# Each callable of SGLang that we call, override or replace, and the parameters that this relies on. SGLang
# has no transfer functions on a CPU, which is why we add them: the methods that call them stand for them.
SURFACES: Final = (
    Surface("sglang.srt.platforms.interface.SRTPlatform.init_backend", ()),
    Surface("sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults", ("server_args",)),
    Surface("sglang.srt.layers.attention.attention_registry.register_attention_backend", ("name",)),
    Surface("sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend", ("model_runner",)),
    Surface(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
        (*_TENSORS, *_REQUESTS, "extend_prefix_lens", "extend_seq_lens", *_OPTIONS),
    ),
    Surface(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode",
        (*_TENSORS, *_REQUESTS, *_OPTIONS),
    ),
    Surface(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        ("backend_name", "handler_func"),
    ),
    Surface("sglang.srt.utils.numa_utils.init_threads_binding", ("numa_index", "world_size")),
    Surface(
        "sglang.srt.distributed.bootstrap._init_cpu_threads_env", ("local_omp_cpuid", "dist_init_method")
    ),
    Surface("sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", ("pin_memory",)),
    Surface("sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes", ("requested_bytes",)),
    Surface("sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.load_to_device_per_layer", _LOAD),
    Surface("sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.backup_from_device_all_layer", _BACKUP),
    Surface("sglang.srt.mem_cache.pool_host.mla.MLATokenToKVPoolHost.load_to_device_per_layer", _LOAD),
    Surface("sglang.srt.mem_cache.pool_host.mla.MLATokenToKVPoolHost.backup_from_device_all_layer", _BACKUP),
)


@functools.cache
def install() -> None:
    """Change this process's SGLang; for our platform only. Raises IncompatibleSGLang if it has changed."""
    check_surfaces(SURFACES)
    _use_suffix_attention()
    _use_plain_host_pools()


def _use_suffix_attention() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    register_attention_backend("torch_native")(_create_attention)
    AttentionBackendRegistry.register("torch_native", _mla_method)


def _create_attention(runner: ModelRunner) -> AttentionBackend:
    from polarkv_sglang.platforms.attention import SuffixAttnBackend

    return SuffixAttnBackend(runner)


def _mla_method(attention: DeepseekV2AttentionMLA, batch: ForwardBatch) -> AttnForwardMethod:
    """Always latent attention: SGLang's other methods hand the keys over, and our backend reads the pool."""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return AttnForwardMethod.MLA


@functools.cache
def bind_ranks() -> None:
    """Share the cores out among ranks; SGLang binds them before it imports the model runner."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.utils import numa_utils

    from polarkv_sglang.platforms import cores

    numa_utils.init_threads_binding = cores.cores_of_rank
    bootstrap._init_cpu_threads_env = cores.bind_rank


def _use_plain_host_pools() -> None:
    from sglang.srt.mem_cache.pool_host import base, mha, mla

    from polarkv_sglang.platforms import transfer

    for module in (mha, mla):
        for function in (
            transfer.transfer_kv_direct,
            transfer.transfer_kv_per_layer_direct_pf_lf,
            transfer.transfer_kv_all_layer_direct_lf_pf,
        ):
            setattr(module, function.__name__, function)

    initialise = base.HostKVCache.__init__

    @functools.wraps(initialise)
    def without_pinning(pool: HostKVCache, **geometry: object) -> None:
        # Pinning is CUDA's: the buffer is registered there, and pages for storage are allocated pinned.
        initialise(pool, **{**geometry, "pin_memory": False})

    base.HostKVCache.__init__ = without_pinning
    # SGLang leaves 10 GiB of RAM free, sized for GPU servers; a laptop has no more than that in all.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = min(
        base.HICACHE_HOST_MEMORY_RESERVE_BYTES, psutil.virtual_memory().total // 10
    )
