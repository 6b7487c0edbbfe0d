"""The platform that SGLang runs on where there is nothing but a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class PolarCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any CPU, PyTorch only: no Triton, no graphs, no device kernels, gloo between ranks."""

    # Not PlatformEnum.CPU: that one promises AMX kernels to the code that asks for it.
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def init_backend(self) -> None:
        from polarkv_sglang.platforms import install_cpu_hooks

        install_cpu_hooks()

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Replaces the defaults that need a GPU or AMX; values that can work here are kept as the user gave them."""
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        if server_args.hicache_io_backend == "kernel":
            server_args.hicache_io_backend = "direct"
            server_args.hicache_mem_layout = "page_first_direct"

    def get_device(self, device_id: int = 0) -> str:
        # SGLang splits the answer like a string when no --device is given; the mixin's torch.device cannot be split.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
