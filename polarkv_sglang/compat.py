"""The surfaces of SGLang that PolarKV builds on, and the check that they are there."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from polarkv_sglang import __version__
from polarkv_sglang.errors import IncompatibleSGLang

BUILT_FOR = "0.5.23"


class Surface(NamedTuple):
    """Something of SGLang, and if we call or override it, the parameters by which we do."""

    path: str
    parameters: tuple[str, ...] = ()


_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache."
_RETRIES = "sglang.srt.mem_cache.storage_prefetch.StoragePrefetchRetries."
_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface."
_STORAGE = "sglang.srt.mem_cache.hicache_storage.HiCacheStorage."
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinker."
_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"
_COUNTER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.LayerWiseLoadCounter"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."

WEIGHT_CHANGES = tuple(
    _UPDATER + name
    for name in (
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_distributed",
        "update_weights_from_ipc",
        "begin_weight_update",
        "end_weight_update",
        "resume_memory_occupation",
        "check_weights",
    )
)
STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
STREAMER_CLASS = _SCHEDULER + "get_output_streamer_class"
BATCH_RESULT = _SCHEDULER + "process_batch_result"
ADDER_CLASS = _SCHEDULER + "get_prefill_adder_class"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner._forward_raw"
ADD_FLAGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
TAKE_FLAGS = "sglang.srt.server_args.ServerArgs.from_cli_args"
META_INFO = "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info"
CACHE_FACTORY = "sglang.srt.mem_cache.registry.create_unified_radix_cache"
CHUNKED_ABORT = _SCHEDULER + "process_pending_chunked_abort"
PREFILL_BATCH = _SCHEDULER + "get_new_batch_prefill"
ABORT = _SCHEDULER + "abort_request"
EXTRA_CONFIG = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller."
    "HybridCacheController.parse_storage_backend_extra_config"
)
BEAMS = "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init"
# Passes that do not wait for the layers which are loaded for them.
HASTY_PASSES = (
    "sglang.srt.managers.tp_worker.BaseTpWorker.forward_batch_embedding",
    "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_split_prefill",
)
ADAPTER_ID = "sglang.srt.lora.lora_registry.LoRARef.deterministic_id"

# Needed to be there at all, in every process.
PLUGIN_SURFACES = (
    Surface(ADD_FLAGS, ("parser",)),
    Surface(TAKE_FLAGS, ("args",)),
    Surface("sglang.srt.plugins.hook_registry.HookRegistry.register", ("target", "hook", "hook_type")),
    Surface("sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks"),
    Surface("sglang.srt.mem_cache.registry.register_radix_cache_backend", ("name", "factory")),
    Surface("sglang.srt.mem_cache.registry.get_radix_cache_factory", ("name",)),
)
# Needed in the process that parses flags, once PolarKV is enabled.
LAUNCH_SURFACES = (
    *PLUGIN_SURFACES,
    Surface(EXTRA_CONFIG, ("storage_backend_extra_config",)),
    Surface(ADAPTER_ID, ("lora_name", "lora_path")),
    Surface(CACHE_FACTORY, ("ctx", "cache_class")),
    Surface(META_INFO, ("meta_info", "state", "customized_info")),
)
# Called by SGLang whenever weights change.
UPDATE_SURFACES = tuple(Surface(path, ("recv_req",)) for path in WEIGHT_CHANGES)
# Needed in scheduler processes.
ENGINE_SURFACES = (
    Surface(_CACHE + "reset"),
    Surface(_CACHE + "insert", ("params",)),
    Surface(_CACHE + "write_backup_storage", ("node_id",)),
    Surface(_CACHE + "check_hicache_events"),
    Surface(_CACHE + "loading_check", ("finish_count",)),
    Surface(_CACHE + "flush_pending_backups"),
    Surface(_CACHE + "is_backuped", ("node_id",)),
    Surface(_CACHE + "_evict_device_leaf", ("node_id", "tracker")),
    Surface(_CACHE + "_drop_subtree_no_host", ("node_id", "tracker")),
    Surface(_CACHE + "_execute_and_commit_kv_backup", ("action", "write_back")),
    Surface(_CACHE + "_handle_prefetch_result", ("operation",)),
    Surface(_CACHE + "check_prefetch_progress", ("request",)),
    Surface(
        _CACHE + "prefetch_from_storage",
        ("request", "last_host_node_id", "new_input_tokens", "last_hash", "prefix_keys"),
    ),
    Surface(_RETRIES + "poll_miss", ("req_id", "storage_hit_end")),
    Surface(_RETRIES + "refetch", ("req_id", "storage_hit_end")),
    Surface(_RETRIES + "cancel", ("req_id",)),
    Surface(_RETRIES + "clear"),
    Surface(_RETRIES + "pop_ready", ("waiting_queue", "interval", "max_attempts")),
    Surface(_CORE + "get_hash_values", ("node_id",)),
    Surface(_CACHE + "_all_reduce", ("data", "tp_reduce_op")),
    Surface(_CORE + "collect_path_info", ("end_node_ids",)),
    Surface(_CORE + "evict_device_start", ("component_type", "request_cnt")),
    Surface(_CORE + "evict_device_next_node", ("component_type", "tracker")),
    Surface(_CORE + "evict_device_end", ("component_type",)),
    Surface("sglang.srt.distributed.parallel_state.get_world_group"),
    Surface("sglang.srt.runtime_context.get_parallel"),
    Surface("sglang.kernels.ops.memory.gpu_tensor_hash.gpu_tensor_hash"),
    Surface(_STORAGE + "batch_exists", ("keys", "extra_info")),
    Surface(_STORAGE + "batch_get_v1", ("keys", "host_indices", "extra_info")),
    Surface(_STORAGE + "batch_set_v1", ("keys", "host_indices", "extra_info")),
    Surface(_STORAGE + "register_mem_pool_host", ("mem_pool_host",)),
    Surface(STREAMER_CLASS),
    Surface(BATCH_RESULT, ("batch", "result")),
    *UPDATE_SURFACES,
    *(Surface(path, ("batch",)) for path in HASTY_PASSES),
    Surface("sglang.srt.managers.tp_worker.TpModelWorker.set_hicache_consumer", ("consumer_index",)),
)
# Needed in scheduler processes in direct mode.
DIRECT_SURFACES = (
    Surface("sglang.srt.mem_cache.unified_cache.linker_factory.create_unified_cache_linker", ("config",)),
    *(
        Surface(_LINKER + name, parameters)
        for name, parameters in {
            "lookup": ("rid", "transfers"),
            "load": ("rid", "transfers"),
            "start_layer_wise_loading": (),
            "finish_layer_wise_loading": ("counter_index",),
            "cancel_queued_load": ("rid",),
            "offload": ("transfers", "session_id"),
            "num_completed_offloads": (),
            "pop_completed_offload": (),
            "record_offload_ready": (),
            "reset": (),
            "close": (),
        }.items()
    ),
    Surface(_WRAPPER, ("cache", "cache_linker")),
    Surface(_WRAPPER + ".match", ("key", "req", "result")),
    Surface(_WRAPPER + "._tail_hashes", ("key", "result", "device_hit_len")),
    Surface(_WRAPPER + "._offload_node", ("node_id", "transfers")),
    Surface(_WRAPPER + ".finish_loads"),
    Surface(_WRAPPER + ".load_back", ("req",)),
    Surface(_WRAPPER + ".release_request", ("rid",)),
    Surface(_WRAPPER + ".reset"),
    Surface(_COUNTER, ("num_layers",)),
    Surface(_COUNTER + ".update_producer"),
    Surface(_COUNTER + ".complete", ("index", "layer")),
    Surface(_COUNTER + ".finish", ("index",)),
    Surface(_COUNTER + ".wait_until", ("threshold",)),
    Surface(_CACHE + "init_cache_linker", ("cache_linker",)),
    Surface(_CACHE + "init_load_back", ("params",)),
    Surface(_CACHE + "finish_external_linker_loads", ("reqs",)),
    Surface(_CACHE + "_all_reduce_attn_groups"),
    Surface(_CORE + "get_prefix_hash_values", ("node_id",)),
    Surface(CHUNKED_ABORT),
    Surface(PREFILL_BATCH, ("running_batch",)),
    Surface(ABORT, ("recv_req",)),
    Surface(BEAMS, ("req", "recv_req")),
    Surface(STREAMER + "._stream_output_embedding", ("reqs",)),
    Surface("sglang.srt.managers.io_struct.BaseReq", ("rid",)),
    Surface("sglang.srt.managers.io_struct.AbortReq", ("abort_all",)),
    Surface("sglang.srt.mem_cache.common.release_kv_cache", ("req", "tree_cache", "checkpoint")),
    Surface("sglang.srt.managers.schedule_batch.Req.reset_for_retract"),
    Surface("sglang.srt.managers.schedule_batch.Req.init_next_round_input", ("tree_cache",)),
    Surface("sglang.srt.environ.Envs.SGLANG_SANITIZE_NAN_LOGITS"),
    Surface("sglang.srt.environ.EnvField.set", ("value",)),
    Surface("sglang.srt.managers.schedule_batch.FINISH_ABORT", ("message", "status_code")),
)
# Needed in scheduler processes that blend.
BLEND_SURFACES = (
    Surface(ADDER_CLASS),
    Surface(FORWARD, ("forward_batch",)),
    Surface("sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", ("req",)),
    Surface("sglang.srt.managers.schedule_policy.AddReqResult"),
    Surface("sglang.srt.managers.schedule_policy.CLIP_MAX_NEW_TOKENS"),
    Surface("sglang.srt.managers.cache_controller.LayerDoneCounter.wait_until", ("threshold",)),
    Surface("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_kv_buffer", ("layer_id",)),
    Surface("sglang.srt.layers.layer_boundary.residual.batch.fold", ("hidden_states", "forward_batch")),
    Surface(
        "sglang.srt.layers.layer_boundary.residual.batch.set_written", ("hidden_states", "forward_batch")
    ),
    Surface("sglang.srt.layers.radix_attention.RadixAttention.forward", ("q", "k", "v", "save_kv_cache")),
    Surface(_CACHE + "match_prefix", ("params",)),
    Surface(_CACHE + "path_device_indices", ("node",)),
    Surface(_CACHE + "lock", ("node_id",)),
    Surface(_CACHE + "unlock", ("lock",)),
    Surface(_CACHE + "on_release", ("req", "checkpointed")),
    Surface(_CACHE + "load_back", ("node_id",)),
    Surface(_CACHE + "inc_host_lock_ref", ("node_id",)),
    Surface(_CACHE + "dec_host_lock_ref", ("node_id", "params")),
    Surface(_CACHE + "full_evictable_size"),
    Surface(_CACHE + "_all_reduce", ("data", "tp_reduce_op")),
    Surface("sglang.srt.mem_cache.common.evict_from_tree_cache", ("tree_cache", "num_tokens")),
    Surface("sglang.srt.mem_cache.utils.get_hash_str", ("token_ids", "prior_hash", "page_size")),
    Surface("sglang.srt.mem_cache.utils.storage_namespace_seed", ("extra_key", "cache_salt")),
)
ALL_SURFACES = (*LAUNCH_SURFACES, *ENGINE_SURFACES, *DIRECT_SURFACES, *BLEND_SURFACES)


def check_surfaces(surfaces: Iterable[Surface]) -> None:
    """Raise IncompatibleSGLang, by name and version, for the first surface that SGLang does not have."""
    for surface in surfaces:
        try:
            found = pkgutil.resolve_name(surface.path)
        except (ImportError, AttributeError) as error:
            reason = f" ({error})" if isinstance(error, ImportError) else ""
            raise _incompatible(f"has no {surface.path}{reason}") from error
        takes = inspect.signature(found).parameters if surface.parameters else ()
        if missing := set(surface.parameters).difference(takes):
            raise _incompatible(f"has {surface.path} without {', '.join(sorted(missing))}")


def apply_hooks(hooks: Mapping[str, Callable[..., object]], *, around: bool = False) -> None:
    """Have our hooks called after (or around) their targets; IncompatibleSGLang as ``check_hooks``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND if around else HookType.AFTER)
    HookRegistry.apply_hooks()
    check_hooks(hooks)


def check_hooks(hooks: Mapping[str, Callable[..., object]]) -> None:
    """Raise IncompatibleSGLang for a target that SGLang's hook registry did not wrap in our hook.

    The registry only logs what fails, and passes over a target that another plugin has hooked earlier.
    """
    for target, hook in hooks.items():
        owner, _, name = target.rpartition(".")
        found = inspect.getattr_static(pkgutil.resolve_name(owner), name)
        if not _wraps(getattr(found, "__func__", found), hook):
            raise _incompatible(f"did not take our hook on {target} (see its log, and other plugins)")


def _wraps(function: object, hook: Callable[..., object]) -> bool:
    """Whether a chain of wrappers, as the hook registry builds them, has ``hook`` in it."""
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _incompatible(what: str) -> IncompatibleSGLang:
    import sglang

    return IncompatibleSGLang(
        f"SGLang {sglang.__version__} {what}, which PolarKV {__version__} needs; "
        f"it was built for SGLang {BUILT_FOR}: pip install sglang=={BUILT_FOR}, or a PolarKV for yours"
    )
