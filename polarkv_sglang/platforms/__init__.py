"""SGLang with HiCache on a plain CPU.

SGLang's own CPU platform needs Intel's AMX kernels. Where neither those nor an accelerator exist,
``activate()`` hands SGLang a platform that runs on PyTorch alone; everywhere else it stays out of the way.
``POLARKV_CPU_PLATFORM=0`` turns it off.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Final

from polarkv_sglang.compat import Surface, check_surfaces
from polarkv_sglang.doctor.surfaces import not_seen
from polarkv_sglang.errors import ConfigError, IncompatibleSGLang, end_with

logger = logging.getLogger(__name__)

PLATFORM_CLASS: Final = "polarkv_sglang.platforms.cpu:PolarCpuPlatform"
# What that class is made of.
_SURFACES: Final = (
    Surface("sglang.srt.platforms.cpu.CpuDeviceMixin"),
    Surface("sglang.srt.platforms.device_mixin.PlatformEnum"),
    Surface("sglang.srt.platforms.interface.PlatformCapabilities"),
    Surface("sglang.srt.platforms.interface.SRTPlatform"),
)


def activate() -> str | None:
    """The path of our platform's class, or None to stay out; SGLang's entry point (``sglang.srt.platforms``).

    Ends the process with one line if ``POLARKV_CPU_PLATFORM`` is neither 0 nor 1: an exception would be
    logged, and SGLang go on with a platform that nobody asked for.
    """
    if not _switched_on() or _sglang_has_a_platform():
        return None
    try:
        check_surfaces(not_seen(_SURFACES))  # by its source: SGLang is being imported
    except IncompatibleSGLang as error:
        logger.warning("PolarKV's CPU platform stays out: %s", error)
        return None
    return PLATFORM_CLASS


def is_active() -> bool:
    """Whether SGLang runs on our platform in this process."""
    if activate() is None:
        return False
    from sglang.srt.platforms import current_platform

    from polarkv_sglang.platforms.cpu import PolarCpuPlatform

    return isinstance(current_platform, PolarCpuPlatform)


def install_cpu_hooks() -> None:
    """Make attention and HiCache work on our platform; does nothing on any other, or a second time.

    SGLang's workers get this through the platform's ``init_backend``. Only code that builds caches or
    attention backends without a model runner has to call it.
    """
    if is_active():
        from polarkv_sglang.platforms import hooks

        hooks.install()


def share_cores() -> None:
    """Let each rank of our platform have its share of the cores; early, when plugins are loaded."""
    if is_active():
        from polarkv_sglang.platforms import hooks

        hooks.bind_ranks()


def _switched_on() -> bool:
    value = os.environ.get("POLARKV_CPU_PLATFORM", "1")
    if value not in ("0", "1"):
        end_with(
            ConfigError(f"POLARKV_CPU_PLATFORM={value!r}: use 0 (off) or 1 (on where nothing better is)")
        )
    return value == "1"


def _sglang_has_a_platform() -> bool:
    import torch

    # SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU platform; whoever sets it gets it.
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return True
    # torch.accelerator covers CUDA, ROCm, XPU, MPS and those that register as PrivateUse1 (NPU, MUSA);
    # Gaudi registers only once its own package is imported, which is not ours to do.
    if torch.accelerator.is_available() or importlib.util.find_spec("habana_frameworks") is not None:
        return True
    return _has_amx_kernels()


def _has_amx_kernels() -> bool:
    """As SGLang's cpu_has_amx_support, whose module cannot be imported before SGLang has its platform."""
    import torch

    if not torch.cpu._is_amx_tile_supported():
        return False
    try:
        import sgl_kernel  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
