"""SGLang's flags for direct mode, and the flags that contradict it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from polarkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

# What SGLang's flag has to be in direct mode, and why anything else is refused.
_REQUIRED: Final[dict[str, tuple[object, str]]] = {
    "radix_cache_backend": (None, "brings its own radix cache"),
    "enable_hierarchical_cache": (False, "has no host tier"),
    "enable_lmcache": (False, "is a cache tier itself"),
    "enable_unified_cache_external_linker": (False, "brings its own linker"),
    "speculative_algorithm": (None, "does not hold the draft model's KV"),
    "disaggregation_mode": ("null", "does not support prefill/decode disaggregation"),
    "enable_streaming_session": (False, "does not support streaming sessions"),
    "pp_size": (1, "does not support pipeline parallelism"),
    # Results of these are used without asking whether the loads of their passes landed.
    "enable_pdmux": (False, "does not support PD multiplexing"),
    "dllm_algorithm": (None, "does not support diffusion language models"),
}
_LINKER: Final = {
    "linker": "PolarLinker",
    "linker_module_path": "polarkv_sglang.hicache.linker",
}


def use_linker(arguments: ServerArgs) -> None:
    """Have an unresolved ServerArgs use our linker; ConfigError that names the flag that is in the way.

    SGLang's overlapped loop is turned off: it launches a pass before it is known whether the KV that the
    pass before it computed rests on KV that is right.
    """
    from sglang.srt.server_args import ServerArgs

    for name, (wanted, reason) in _REQUIRED.items():
        value = getattr(arguments, name)
        if value != wanted:
            raise _conflict(name, value, reason)
    defaults = ServerArgs(model_path=arguments.model_path)
    for name in ServerArgs.__struct_fields__:
        if name.startswith("hicache_") and getattr(arguments, name) != getattr(defaults, name):
            raise _conflict(name, getattr(arguments, name), "has no host tier")
    arguments.disable_overlap_schedule = True
    arguments.enable_unified_cache_external_linker = True
    arguments.unified_cache_external_linker_backend = "dynamic"
    arguments.unified_cache_external_linker_config = dict(_LINKER)


def _conflict(name: str, value: object, reason: str) -> ConfigError:
    flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    return ConfigError(f"--polarkv-mode direct {reason}; leave out {flag}, or use --polarkv-mode hicache")
