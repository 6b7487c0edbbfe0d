"""Python and the packages that PolarKV is built on; this module needs none of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from polarkv_sglang import __version__
from polarkv_sglang.doctor.findings import Facts, Finding, one_line

_PYTHONS = ((3, 11), (3, 14))  # from, to below: requires-python
_MACHINES = frozenset({"x86_64", "aarch64"})
# Module and distribution. Not SGLang and torch: they have a check of their own, and take long to import.
_NEEDED = {
    "cffi": "cffi",
    "msgspec": "msgspec",
    "numpy": "numpy",
    "prometheus_client": "prometheus-client",
    "psutil": "psutil",
    "xxhash": "xxhash",
}


def check_python(facts: Facts) -> Iterator[Finding]:
    version = platform.python_version()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    text = f"Python {version}, {system}, PolarKV {__version__}"
    low, high = (".".join(map(str, limit)) for limit in _PYTHONS)
    if not _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]:
        yield Finding("python", "failed", text, f"use a Python from {low} to below {high}")
    elif platform.system() != "Linux":
        yield Finding(
            "python", "failed", text, "run on Linux: memory is shared by memfd and watched by epoll"
        )
    elif platform.machine() not in _MACHINES:
        yield Finding(
            "python", "warning", text, "there is no libucx wheel for this machine: install UCX 1.17 or later"
        )
    else:
        yield Finding("python", "ok", text)


def check_packages(facts: Facts) -> Iterator[Finding]:
    faults: dict[str, str] = {}
    versions: dict[str, str] = {}
    for module, distribution in _NEEDED.items():
        try:
            importlib.import_module(module)
            versions[distribution] = importlib.metadata.version(distribution)
        except ImportError as error:
            faults[distribution] = one_line(error)
    if faults:
        text = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        mend = f"{sys.executable} -m pip install --force-reinstall {' '.join(faults)}"
        yield Finding("packages", "failed", text, mend, versions)
    else:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Finding("packages", "ok", text, details=versions)
