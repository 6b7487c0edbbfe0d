"""A launch that cannot work ends with one line, before a model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

# As ``python -m sglang.launch_server``, on an SGLang that lacks something.
WITHOUT = """
import pkgutil, runpy
delattr(pkgutil.resolve_name("{owner}"), "{name}")
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""
SERVE = ("-m", "sglang.launch_server")
FLAGS = ("--model-path", "/nowhere", "--enable-polarkv", "--polarkv-nodes", "127.0.0.1:7411")


def launch(*line: str, **environment: str) -> str:
    """What a launch says last; it has to end as for a wrong flag."""
    done = subprocess.run(
        [sys.executable, *line], env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_transports_that_ucx_does_not_take() -> None:
    said = launch(*SERVE, *FLAGS, "--polarkv-ucx-tls", "cma")
    assert said.startswith("polarkv: error: UCX cannot be used with ucx_tls 'cma': UCX transports 'cma' lack")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_a_cpu_platform_that_is_neither_on_nor_off() -> None:
    said = launch(*SERVE, *FLAGS, POLARKV_CPU_PLATFORM="yes")
    assert said.startswith("polarkv: error: POLARKV_CPU_PLATFORM='yes': use 0 (off) or 1")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("sglang.srt.mem_cache.registry", "register_radix_cache_backend"),
        ("sglang.srt.mem_cache.hicache_storage.HiCacheStorage", "register_mem_pool_host"),
    ],
    ids=["for the plugin", "for the schedulers"],
)
def test_an_sglang_that_differs(owner: str, name: str) -> None:
    said = launch("-c", WITHOUT.format(owner=owner, name=name), *FLAGS)
    assert said.startswith("polarkv: error: SGLang ")
    assert f"has no {owner}.{name}, which PolarKV" in said
