"""SGLang's entry point into PolarKV: flags, and the cache backend that the flags choose.

Installed, it adds flags and registers a backend that nobody uses; all else happens once
``--enable-polarkv`` is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from polarkv_sglang import compat
from polarkv_sglang.accounting import flatten_meta_info
from polarkv_sglang.config import ENABLE_FLAG, PolarConfig, add_flags, build_config, from_flags
from polarkv_sglang.direct_flags import use_linker
from polarkv_sglang.doctor.surfaces import not_seen
from polarkv_sglang.errors import ConfigError, IncompatibleSGLang, PolarError, end_with
from polarkv_sglang.pool.nodes import read_nodes
from polarkv_sglang.transport.control import NodeTimeout
from polarkv_sglang.transport.tls import client_tls
from polarkv_sglang.ucx_check import check_ucx

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs

BACKEND = "polarkv"
# An attribute that is not a field of ServerArgs: it travels to the schedulers and is never printed,
# which a token must not be.
_CONFIG_ATTRIBUTE = "_polarkv"

logger = logging.getLogger(__name__)

_enabled = False  # in this process; LoRA adapters are then named by content
_hosts = 1  # that the engine runs on


def activate() -> None:
    """Register our hooks; called by SGLang's plugin loader in each of its processes.

    On an SGLang that lacks what that takes we stay out, and if PolarKV was asked for the process ends with
    one line: the loader would print a trace and go on, and argparse would not know the flag.
    """
    try:
        compat.check_surfaces(compat.PLUGIN_SURFACES)
    except IncompatibleSGLang as error:
        if ENABLE_FLAG in sys.argv:
            end_with(error)
        logger.warning("PolarKV stays out: %s", error)
        return
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from polarkv_sglang.platforms import share_cores

    share_cores()
    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, _create_cache)
    for target, hook in _LAUNCH_HOOKS.items():
        kind = HookType.AROUND if hook in (_name_adapter, _choose_cache) else HookType.AFTER
        HookRegistry.register(target, hook, kind)


def server_args(*, polarkv: dict[str, object] | PolarConfig | None = None, **settings: object) -> ServerArgs:
    """ServerArgs with PolarKV enabled, for ``sglang.Engine(server_args=...)`` and for forks.

    ``polarkv`` holds settings by the names of the config file (None: from the POLARKV_* variables),
    ``settings`` are SGLang's own. Raises ConfigError or IncompatibleSGLang.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    arguments = ServerArgs(**settings)
    if polarkv is None:
        config = from_flags(argparse.Namespace())
    else:
        config = polarkv if isinstance(polarkv, PolarConfig) else build_config(polarkv)
    enable(arguments, config)
    return arguments


def enable(arguments: ServerArgs, config: PolarConfig) -> None:
    """Make an unresolved ServerArgs use PolarKV; starts or joins the embedded memory node if none is named.

    Raises ConfigError for flags that contradict each other or cannot be used, IncompatibleSGLang, NodeError.
    """
    global _enabled, _hosts
    compat.check_surfaces(compat.LAUNCH_SURFACES)
    compat.check_hooks(_LAUNCH_HOOKS)
    if arguments.disable_radix_cache:
        raise ConfigError("--enable-polarkv needs the radix cache; leave out --disable-radix-cache")
    # What is wrong with these is better found before the model is loaded than in the schedulers.
    client_tls(config.tls_cert, config.tls_key, config.tls_ca)
    if config.nodes_file is not None:
        read_nodes(Path(config.nodes_file))
    if config.ucx_tls is not None or config.ucx_library is not None:
        check_ucx(tls=config.ucx_tls, library=config.ucx_library)
    if config.mode == "direct":
        use_linker(arguments)
    else:
        _use_hicache(arguments, config)
    _check_scheduler_surfaces(config)
    if not (config.nodes or config.nodes_file):
        if arguments.nnodes > 1:
            raise ConfigError(
                f"an engine on {arguments.nnodes} hosts needs memory nodes that all of them reach; "
                "name them by --polarkv-nodes or --polarkv-nodes-file"
            )
        config = _with_embedded_node(config)
    setattr(arguments, _CONFIG_ATTRIBUTE, config)
    compat.apply_hooks({compat.META_INFO: flatten_meta_info})
    _enabled, _hosts = True, arguments.nnodes


def _check_scheduler_surfaces(config: PolarConfig) -> None:
    """Raise IncompatibleSGLang for what the schedulers will need and SGLang does not have."""
    # SGLang is about to import the modules of these anyway.
    compat.check_surfaces(compat.ENGINE_SURFACES)
    if config.mode == "direct":
        compat.check_surfaces(compat.DIRECT_SURFACES)
    if config.blend != "off":
        # Of these it imports some in schedulers only, since they make CUDA start: the source tells as well.
        compat.check_surfaces(not_seen(compat.BLEND_SURFACES))


def _use_hicache(arguments: ServerArgs, config: PolarConfig) -> None:
    """Flags of hicache mode; ConfigError for those that contradict it."""
    if arguments.radix_cache_backend not in (None, BACKEND):
        raise ConfigError(
            f"--enable-polarkv brings its own radix cache; leave out --radix-cache-backend "
            f"{arguments.radix_cache_backend}"
        )
    if arguments.hicache_storage_backend not in (None, "dynamic"):
        raise ConfigError(
            f"--enable-polarkv is the storage of HiCache; leave out --hicache-storage-backend "
            f"{arguments.hicache_storage_backend}"
        )
    arguments.radix_cache_backend = BACKEND
    arguments.enable_hierarchical_cache = True
    arguments.hicache_storage_backend = "dynamic"
    arguments.hicache_storage_backend_extra_config = _storage_config(
        arguments.hicache_storage_backend_extra_config
    )
    if config.spill == "evict":
        arguments.hicache_write_policy = "write_back"


def config_of(arguments: ServerArgs) -> PolarConfig | None:
    """The PolarKV settings of a ServerArgs; None where it is not enabled."""
    config = getattr(arguments, _CONFIG_ATTRIBUTE, None)
    return config if isinstance(config, PolarConfig) else None


def _with_embedded_node(config: PolarConfig) -> PolarConfig:
    import msgspec

    from polarkv_sglang.pool.embedded import default_capacity_bytes, start_or_join

    try:
        node = start_or_join(
            capacity_bytes=config.capacity_bytes or default_capacity_bytes(),
            token=config.token,
            ucx_tls=config.ucx_tls,
            ucx_library=config.ucx_library,
        )
    except NodeTimeout as error:
        logger.warning("PolarKV: %s; the engine serves without a pool", error)
        return config
    _lifelines.append(node)
    return msgspec.structs.replace(config, nodes=(node.address,), token=node.token)


_lifelines: list[object] = []  # connections that keep embedded nodes alive as long as this process


def _storage_config(given: str | None) -> str:
    """HiCache's extra config with our storage class in it; the user's own keys stay."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    try:
        # JSON, or @ and a file of JSON, TOML or YAML: what SGLang takes, it takes.
        parse = HybridCacheController.parse_storage_backend_extra_config
        values, threshold, timeout_base, timeout_per_ki_token, _ = parse(given)
        return json.dumps(
            {
                **values,
                "prefetch_threshold": threshold,
                "prefetch_timeout_base": timeout_base,
                "prefetch_timeout_per_ki_token": timeout_per_ki_token,
                "hicache_storage_pass_prefix_keys": True,  # a page's place in its prefix decides its node
                "backend_name": BACKEND,
                "module_path": "polarkv_sglang.hicache.storage",
                "class_name": "PolarStorage",
                "interface_v1": 1,
            }
        )
    except Exception as error:  # each format has its own
        reason = " ".join(str(error).split())
        raise ConfigError(f"--hicache-storage-backend-extra-config {given}: {reason}") from error


def _add_flags(_result: None, parser: argparse.ArgumentParser) -> None:
    add_flags(parser)


def _take_flags(arguments: ServerArgs, _cls: type, args: argparse.Namespace) -> None:
    if not getattr(args, "enable_polarkv", False):
        return
    try:
        enable(arguments, from_flags(args))
    except PolarError as error:
        end_with(error)


def _name_adapter(original: object, lora_name: str, lora_path: str) -> str:
    """LoRA id of an adapter from ``--lora-paths``: by content, where SGLang takes name and path.

    The id is all that tells adapters apart in page hashes. Two engines may have different adapters
    under one name and path, or one may be trained on between two starts.
    """
    assert callable(original)
    plain = str(original(lora_name, lora_path))
    if not _enabled:
        return plain
    from uuid import NAMESPACE_URL, uuid5

    from polarkv_sglang.identity import digest_adapter

    folder = Path(lora_path)
    if not folder.is_dir() and _hosts > 1:
        raise ConfigError(
            f"--lora-paths {lora_path} is no folder: with --enable-polarkv and --nnodes {_hosts} download "
            "the adapter first, so that all hosts name it by its content"
        )
    # What an adapter's name on a hub holds is not known here; a fresh id is never shared.
    content = digest_adapter(folder) if folder.is_dir() else uuid4().hex
    return uuid5(NAMESPACE_URL, f"{plain}\0{content}").hex


def _create_cache(context: object) -> object:
    from polarkv_sglang.engine import create_cache

    return create_cache(context)


def _choose_cache(original: Callable[..., object], context: TreeCacheBuildContext, **more: object) -> object:
    """Around SGLang's cache factory, which direct mode goes through with no backend named."""
    config = config_of(context.server_args)
    if config is None or config.mode != "direct":
        return original(context, **more)
    from polarkv_sglang.engine import create_direct_cache

    return create_direct_cache(original, context)


_LAUNCH_HOOKS: dict[str, Callable[..., object]] = {
    compat.ADD_FLAGS: _add_flags,
    compat.TAKE_FLAGS: _take_flags,
    compat.ADAPTER_ID: _name_adapter,
    compat.CACHE_FACTORY: _choose_cache,
}
