"""When our platform is there, and that nothing changes where it is not. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from polarkv_sglang import platforms
from polarkv_sglang.compat import Surface, check_surfaces
from polarkv_sglang.platforms.hooks import SURFACES

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="for machines without an accelerator"
)

OURS = "polarkv_sglang.platforms.cpu:PolarCpuPlatform"
ACTIVATE = "from polarkv_sglang.platforms import activate; print(activate())"
# What a PyTorch for AMX with SGLang's CPU kernels looks like to SGLang.
AMX_CPU = "import torch; torch.cpu._is_amx_tile_supported = lambda: True; "
AMX_KERNELS = (
    "import sys, types; sys.modules['sgl_kernel'] = types.ModuleType('sgl_kernel'); "
    "torch.library.define('sgl_kernel::convert_weight_packed', '(Tensor x) -> Tensor'); "
)
ACCELERATOR = "import torch; torch.accelerator.is_available = lambda: True; "
# The class of SGLang's platform, and whether its host pools are still its own once ours had its chance.
STATE = """
from sglang.srt.platforms import current_platform
from polarkv_sglang.platforms import install_cpu_hooks
install_cpu_hooks()
from sglang.srt.mem_cache.pool_host import base
print(type(current_platform).__name__, hasattr(base.HostKVCache.__init__, "__wrapped__"))
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ignored = ("POLARKV_CPU_PLATFORM", "SGLANG_USE_CPU_ENGINE", "SGLANG_PLATFORM")
    inherited = {name: value for name, value in os.environ.items() if name not in ignored}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=110
    )


@pytest.mark.parametrize("setup", ["", AMX_CPU], ids=["plain CPU", "AMX without SGLang's kernels"])
def test_a_machine_with_nothing_better_runs_on_ours(setup: str) -> None:
    assert _python(setup + ACTIVATE).stdout.strip() == OURS


@pytest.mark.parametrize(
    ("setup", "environment"),
    [
        (ACCELERATOR, {}),
        (AMX_CPU + AMX_KERNELS, {}),
        ("", {"SGLANG_USE_CPU_ENGINE": "1"}),
        ("", {"POLARKV_CPU_PLATFORM": "0"}),
    ],
    ids=["accelerator", "AMX with SGLang's kernels", "SGLang's CPU platform asked for", "turned off"],
)
def test_where_something_better_is_ours_stays_out(setup: str, environment: dict[str, str]) -> None:
    assert _python(setup + ACTIVATE, **environment).stdout.strip() == "None"


def test_an_unknown_setting_ends_sglang_with_one_line_that_names_it() -> None:
    result = _python("from sglang.srt.platforms import current_platform", POLARKV_CPU_PLATFORM="yes")
    assert result.returncode == 2
    assert "polarkv: error: POLARKV_CPU_PLATFORM='yes': use 0 (off) or 1" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_an_sglang_that_differs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert platforms.activate() == OURS
    absent = Surface("sglang.srt.platforms.interface.SRTPlatform.fly")
    monkeypatch.setattr(platforms, "_SURFACES", (*platforms._SURFACES, absent))
    assert platforms.activate() is None
    assert f"has no {absent.path}, which PolarKV" in caplog.text


def test_sglang_takes_our_platform_and_its_hooks() -> None:
    assert _python(STATE).stdout.split()[-2:] == ["PolarCpuPlatform", "True"]


def test_turned_off_sglang_is_untouched() -> None:
    assert _python(STATE, POLARKV_CPU_PLATFORM="0").stdout.split()[-2:] == ["SRTPlatform", "False"]


def test_sglang_has_the_surfaces_that_the_hooks_need() -> None:
    check_surfaces(SURFACES)
