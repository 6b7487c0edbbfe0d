"""The platform that SGLang runs on where there is nothing but a CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

# Weights and L1 get this share of the free RAM; L2, twice as large as L1 by default, lives in the same RAM.
_MEMORY_FRACTION: Final = 0.25
# Without L2, but with L1 backed by pages from the start, as the pool registers it.
_LINKER_MEMORY_FRACTION: Final = 0.5


class PolarCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any CPU, PyTorch only: no Triton, no graphs, no device kernels, gloo between ranks."""

    # Not PlatformEnum.CPU: that one promises AMX kernels to the code that asks for it.
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        # SGLang decorates small functions with torch.compile; Inductor wants a C++ compiler and a minute of
        # start-up for them. The decorators read this when they are applied, which is after this point.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    def init_backend(self) -> None:
        from polarkv_sglang.platforms import install_cpu_hooks

        install_cpu_hooks()

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Replace the defaults that assume a GPU or AMX; what the user chose and can work here stays."""
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        if server_args.hicache_io_backend == "kernel":
            server_args.hicache_io_backend = "direct"
            server_args.hicache_mem_layout = "page_first_direct"
        if server_args.mem_fraction_static is None:
            if server_args.enable_hierarchical_cache:
                server_args.mem_fraction_static = _MEMORY_FRACTION
            elif server_args.enable_unified_cache_external_linker:
                server_args.mem_fraction_static = _LINKER_MEMORY_FRACTION
        # The overlapped loop looks at a batch's result after it has launched the next batch. Here a launch is
        # the whole computation: every first token would wait for a decode step.
        server_args.disable_overlap_schedule = True
        # An idle scheduler that polls takes a core from whatever else runs on the host.
        server_args.sleep_on_idle = True

    def get_device(self, device_id: int = 0) -> str:
        # Not the mixin's torch.device: without --device, SGLang 0.5.23 splits the answer like a string.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
