"""The systems under comparison: SGLang with its caches as it comes, with other stores, and with PolarKV."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from examples.common.processes import Process, accepts, engine
from examples.multiturn.presets import Preset
from polarkv_sglang.errors import ConfigError

BASELINE = "radix"
POLARKV = "polarkv"
POLARKV_DIRECT = "polarkv-direct"
MIN_NODE_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how systems are started."""

    preset: Preset
    model: str
    tp: int
    logs: Path
    storage: Path  # an empty folder for the file backend
    ports: Iterator[int]  # free TCP ports; each is taken once
    nodes: tuple[str, ...] = ()  # memory nodes that run already; none: one is started here
    engine_flags: tuple[str, ...] = ()
    mooncake_python: Path | None = None
    mooncake_protocol: str = "tcp"


class Plan(NamedTuple):
    """The processes of one system; helpers must be ready before the engine starts."""

    url: str
    helpers: list[Process]
    engine: Process


class System(NamedTuple):
    """One way to run SGLang."""

    name: str  # on the command line and in the figures
    label: str
    has_l3: bool
    plan: Callable[[Setting], Plan]


def _start(
    name: str,
    setting: Setting,
    flags: list[str],
    helpers: list[Process],
    environment: dict[str, str] | None = None,
) -> Plan:
    port = next(setting.ports)
    preset = setting.preset
    common = ["--page-size", str(preset.page_tokens), "--max-total-tokens", str(preset.tiers.l1_tokens)]
    common += ["--tp", str(setting.tp), *preset.engine_flags, *setting.engine_flags]
    process = engine(
        name,
        setting.model,
        port,
        common + flags,
        setting.logs / f"{name}.log",
        environment,
        preset.start_timeout_s,
    )
    return Plan(f"http://127.0.0.1:{port}", helpers, process)


def _l2_flags(setting: Setting) -> list[str]:
    return ["--enable-hierarchical-cache", "--hicache-ratio", f"{setting.preset.tiers.l2_ratio:.4f}"]


def _storage_flags(setting: Setting, backend: str, config: dict[str, object]) -> list[str]:
    storage = ["--hicache-storage-backend", backend, "--hicache-storage-backend-extra-config"]
    return [*_l2_flags(setting), *storage, json.dumps(config)]


def _radix(setting: Setting) -> Plan:
    return _start(BASELINE, setting, [], [])


def _hicache(setting: Setting) -> Plan:
    return _start("hicache", setting, _l2_flags(setting), [])


def _hicache_file(setting: Setting) -> Plan:
    config = {
        "file_storage_path": str(setting.storage.absolute()),
        "max_size": setting.preset.tiers.l3_bytes,
    }
    return _start("hicache-file", setting, _storage_flags(setting, "file", config), [])


def _mooncake(setting: Setting) -> Plan:
    python = setting.mooncake_python or Path(sys.executable)
    master_port, metrics_port, owner_port = (next(setting.ports) for _ in range(3))
    master = [str(python.with_name("mooncake_master")), "--rpc_address=127.0.0.1"]
    master += [f"--rpc_port={master_port}", "--metrics_host=127.0.0.1", f"--metrics_port={metrics_port}"]
    segment_mib = max(setting.preset.tiers.l3_bytes, MIN_NODE_BYTES) >> 20
    owner = [str(python.with_name("mooncake_client")), "--host=127.0.0.1", f"--port={owner_port}"]
    owner += [f"--master_server_address=127.0.0.1:{master_port}", "--metadata_server=P2PHANDSHAKE"]
    owner += [f"--protocol={setting.mooncake_protocol}", f"--global_segment_size={segment_mib}MB"]
    helpers = [
        Process(f"mooncake {program}", command, _listens_on(port), setting.logs / f"mooncake_{program}.log")
        for program, command, port in (("master", master, master_port), ("owner", owner, owner_port))
    ]
    config = {
        "master_server_address": f"127.0.0.1:{master_port}",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": setting.mooncake_protocol,
        "local_hostname": "127.0.0.1",
        "global_segment_size": 0,  # the owner lends the memory
    }
    environment = None
    if setting.mooncake_python is not None:
        alone = str(_mooncake_alone(setting.mooncake_python, setting.logs))
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [alone, os.environ.get("PYTHONPATH")]))}
    return _start("mooncake", setting, _storage_flags(setting, "mooncake", config), helpers, environment)


def _mooncake_alone(python: Path, folder: Path) -> Path:
    """A folder to import Mooncake from, and nothing else of the environment that it is installed in."""
    (package,) = _import_mooncake(python).stdout.split("\n")[:1]
    alone = folder.absolute() / "mooncake_packages"
    alone.mkdir(exist_ok=True)
    for entry in Path(package).parent.glob("mooncake*"):
        link = alone / entry.name
        link.unlink(missing_ok=True)
        link.symlink_to(entry)
    return alone


def _import_mooncake(python: Path) -> subprocess.CompletedProcess[str]:
    code = "import mooncake.store, pathlib; print(pathlib.Path(mooncake.store.__file__).parent)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)


def _polarkv(setting: Setting) -> Plan:
    return _with_pool(POLARKV, setting, [])


def _polarkv_direct(setting: Setting) -> Plan:
    return _with_pool(POLARKV_DIRECT, setting, ["--polarkv-mode", "direct"])


def _with_pool(name: str, setting: Setting, flags: list[str]) -> Plan:
    nodes, helpers = setting.nodes, []
    if not nodes:
        port = next(setting.ports)
        nodes = (f"127.0.0.1:{port}",)
        capacity = max(setting.preset.tiers.l3_bytes, MIN_NODE_BYTES)
        command = [sys.executable, "-m", "polarkv_sglang.cli", "node", "--listen", nodes[0]]
        command += ["--capacity", str(capacity)]
        helpers = [
            Process(f"{name} memory node", command, _listens_on(port), setting.logs / f"{name}_node.log")
        ]
    pool = ["--enable-polarkv", "--polarkv-nodes", ",".join(nodes), *flags]
    ratio = [] if name == POLARKV_DIRECT else _l2_flags(setting)
    return _start(name, setting, ratio + pool, helpers)


def _listens_on(port: int) -> Callable[[], bool]:
    return lambda: accepts(port)


SYSTEMS = {
    system.name: system
    for system in (
        System(BASELINE, "radix cache only", False, _radix),
        System("hicache", "HiCache L2", False, _hicache),
        System("hicache-file", "HiCache file backend", True, _hicache_file),
        System("mooncake", "Mooncake store", True, _mooncake),
        System(POLARKV, "PolarKV", True, _polarkv),
        System(POLARKV_DIRECT, "PolarKV direct mode", True, _polarkv_direct),
    )
}


def unavailable(name: str, mooncake_python: Path | None) -> str | None:
    """Why a system cannot be run here; None if it can."""
    if name == "mooncake":
        python = mooncake_python or Path(sys.executable)
        if not python.is_file():
            return f"there is no {python}"
        probe = _import_mooncake(python)
        if probe.returncode:
            reason = (probe.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
            return f"{python} has no usable Mooncake: {reason}; see benchmarks/README.md"
    return None


def choose(names: str | None, mooncake_python: Path | None, running: Collection[str] = ()) -> list[System]:
    """The systems of a comma-separated list, the baseline first; None: all that can be run here.

    What is ``running`` need not be startable. Raises ConfigError for a name that is unknown or given twice,
    or a system that cannot be run here.
    """
    if names is None:
        reasons = {name: unavailable(name, mooncake_python) for name in SYSTEMS}
        return [system for name, system in SYSTEMS.items() if name in running or reasons[name] is None]
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in SYSTEMS:
            raise ConfigError(f"unknown system {name!r}; there are {', '.join(SYSTEMS)}")
        if chosen.count(name) > 1:
            raise ConfigError(f"system {name} is named twice")
        reason = None if name in running else unavailable(name, mooncake_python)
        if reason is not None:
            raise ConfigError(f"system {name} cannot be run: {reason}")
    return [system for system in SYSTEMS.values() if system.name in chosen]
