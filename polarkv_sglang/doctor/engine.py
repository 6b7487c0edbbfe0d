"""The engine's side: settings, SGLang, our plugin in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec

from polarkv_sglang.compat import ALL_SURFACES, BUILT_FOR
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.doctor.findings import Facts, Finding, one_line
from polarkv_sglang.doctor.surfaces import not_seen
from polarkv_sglang.errors import ConfigError

_IMPORT_DEADLINE_S = 300.0
_IMPORT = """
import sys
from polarkv_sglang.compat import ALL_SURFACES, check_surfaces
from polarkv_sglang.errors import IncompatibleSGLang
try:
    check_surfaces(ALL_SURFACES)
except IncompatibleSGLang as error:
    print(error)
    sys.exit(3)
"""
_INCOMPATIBLE = 3
_SECRETS = frozenset({"token"})


def check_configuration(facts: Facts) -> Iterator[Finding]:
    try:
        config, default = facts.config, PolarConfig()
    except ConfigError as error:
        text, _, way_out = one_line(error).partition("; ")
        mend = "correct or unset it: until then none of them counts"
        mend += f" ({way_out})" if way_out else ""
        yield Finding("configuration", "failed", text, mend)
        return
    chosen = {
        name: "(set)" if field in _SECRETS else getattr(config, field)
        for field, name in zip(PolarConfig.__struct_fields__, PolarConfig.__struct_encode_fields__)
        if getattr(config, field) != getattr(default, field)
    }
    file = os.environ.get("POLARKV_CONFIG")
    source = f"POLARKV_* and {file}" if file else "POLARKV_*"
    spelled = ", ".join(f"{name} {_spell(value)}" for name, value in chosen.items())
    text = f"{spelled or 'all defaults'} (from {source})"
    yield Finding("configuration", "ok", text, details=msgspec.to_builtins(chosen))


def check_sglang(facts: Facts) -> Iterator[Finding]:
    """By its source; only where that does not show everything, SGLang is imported, by another process."""
    install = f"pip install sglang=={BUILT_FOR}, or a PolarKV for this SGLang"
    if importlib.util.find_spec("sglang") is None:
        text = "SGLang is not installed here: memory nodes do without, engines do not"
        yield Finding("sglang", "warning", text, install)
        return
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    details = {"version": version, "built_for": BUILT_FOR}
    built_for = "" if version == BUILT_FOR else f" (PolarKV was built for {BUILT_FOR})"
    unseen = not_seen(ALL_SURFACES)
    if not unseen:
        text = f"SGLang {version}{built_for}: all {len(ALL_SURFACES)} surfaces are in its source"
        yield Finding("sglang", "ok", text, details=details)
        return
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        capture_output=True,
        text=True,
        timeout=_IMPORT_DEADLINE_S,
        check=False,
    )
    how = f"(imported with torch to see, {time.monotonic() - started:.0f} s)"
    if done.returncode == 0:
        text = f"SGLang {version}{built_for}: all {len(ALL_SURFACES)} surfaces are there {how}"
        yield Finding("sglang", "ok", text, details=details)
    elif done.returncode == _INCOMPATIBLE:
        text = done.stdout.strip().splitlines()[-1].partition("; ")[0]
        yield Finding("sglang", "failed", f"{text} {how}", install, details)
    else:
        last_words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        text = f"SGLang {version} cannot be imported: {last_words}; not seen: {unseen[0].path}"
        yield Finding("sglang", "failed", text, install, details)


def check_plugin(facts: Facts) -> Iterator[Finding]:
    """SGLang finds us, and with us ``--enable-polarkv``, by an entry point."""
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="polarkv")
    modules = sorted({point.module for point in points})
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if "polarkv_sglang.plugin" not in modules:
        other = f" ({', '.join(modules)} has its name)" if modules else ""
        yield Finding(
            "plugin",
            "failed",
            f"SGLang does not see the plugin{other}: --enable-polarkv will be unknown",
            f"install the package into this Python: {sys.executable} -m pip install .",
        )
    elif allowed and "polarkv" not in [name.strip() for name in allowed.split(",")]:
        text = f"SGLANG_PLUGINS={allowed} leaves polarkv out: --enable-polarkv will be unknown"
        yield Finding("plugin", "failed", text, "add polarkv to SGLANG_PLUGINS or unset it")
    else:
        yield Finding("plugin", "ok", "SGLang sees it: --enable-polarkv is known")


def _spell(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
