"""When our platform is there, and that nothing changes where it is not. Each case is a process of its own."""

from __future__ import annotations

import json
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
# What a PyTorch for AMX with SGLang's CPU kernels looks like to SGLang.
AMX_CPU = "torch.cpu._is_amx_tile_supported = lambda: True; "
AMX_KERNELS = (
    "import sys, types; sys.modules['sgl_kernel'] = types.ModuleType('sgl_kernel'); "
    "torch.library.define('sgl_kernel::convert_weight_packed', '(Tensor x) -> Tensor'); "
)
ACCELERATOR = "torch.accelerator.is_available = lambda: True; "
# What is changed in a process and in its environment before it asks for our platform.
NOTHING_BETTER = {"plain CPU": ("", {}), "AMX without SGLang's kernels": (AMX_CPU, {})}
SOMETHING_BETTER = {
    "accelerator": (ACCELERATOR, {}),
    "AMX with SGLang's kernels": (AMX_CPU + AMX_KERNELS, {}),
    "SGLang's CPU platform asked for": ("", {"SGLANG_USE_CPU_ENGINE": "1"}),
    "turned off": ("", {"POLARKV_CPU_PLATFORM": "0"}),
}
# PyTorch takes seconds to import: once, and each case is a fork of that.
FORKS = """
import json, os, sys
import torch

for name, (setup, environment) in json.load(sys.stdin).items():
    if (case := os.fork()) == 0:
        os.environ.update(environment)
        exec(setup)
        from polarkv_sglang.platforms import activate
        print(json.dumps([name, activate()]), flush=True)
        os._exit(0)
    os.waitpid(case, 0)
"""
# The class of SGLang's platform, and what became of its host pools once ours had its chance. Who has not even
# imported what changes SGLang has not changed it, and need not import SGLang to see it.
STATE = """
import sys
from sglang.srt.platforms import current_platform
from polarkv_sglang.platforms import install_cpu_hooks
install_cpu_hooks()
if "polarkv_sglang.platforms.hooks" not in sys.modules:
    state = "untouched"
else:
    from sglang.srt.mem_cache.pool_host import base
    state = "hooked" if hasattr(base.HostKVCache.__init__, "__wrapped__") else "not hooked"
print(type(current_platform).__name__, state)
"""


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    ignored = ("POLARKV_CPU_PLATFORM", "SGLANG_USE_CPU_ENGINE", "SGLANG_PLATFORM")
    inherited = {name: value for name, value in os.environ.items() if name not in ignored}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=inherited | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def activated() -> dict[str, str | None]:
    """What activate() returned in each case."""
    with start(FORKS) as process:
        output, _ = process.communicate(json.dumps(NOTHING_BETTER | SOMETHING_BETTER), 110)
    return dict(json.loads(line) for line in output.splitlines())


@pytest.mark.parametrize("case", NOTHING_BETTER)
def test_a_machine_with_nothing_better_runs_on_ours(activated: dict[str, str | None], case: str) -> None:
    assert activated[case] == OURS


@pytest.mark.parametrize("case", SOMETHING_BETTER)
def test_where_something_better_is_ours_stays_out(activated: dict[str, str | None], case: str) -> None:
    assert activated[case] is None


def test_an_unknown_setting_ends_sglang_with_one_line_that_names_it() -> None:
    with start(f"import sys; sys.stderr = sys.stdout; {STATE}", POLARKV_CPU_PLATFORM="yes") as process:
        said, _ = process.communicate(timeout=110)
    assert process.returncode == 2
    assert "polarkv: error: POLARKV_CPU_PLATFORM='yes': use 0 (off) or 1" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_an_sglang_that_differs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert platforms.activate() == OURS
    absent = Surface("sglang.srt.platforms.interface.SRTPlatform.fly")
    monkeypatch.setattr(platforms, "_SURFACES", (*platforms._SURFACES, absent))
    assert platforms.activate() is None
    assert f"has no {absent.path}, which PolarKV" in caplog.text


def test_sglang_takes_our_platform_and_its_hooks_and_is_untouched_where_it_is_turned_off() -> None:
    with start(STATE) as on, start(STATE, POLARKV_CPU_PLATFORM="0") as off:
        said = [process.communicate(timeout=110)[0].splitlines()[-1] for process in (on, off)]
    assert said == ["PolarCpuPlatform hooked", "SRTPlatform untouched"]


def test_sglang_has_the_surfaces_that_the_hooks_need() -> None:
    check_surfaces(SURFACES)
