"""UCX: which libucp, what it offers on this host, and RDMA."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from polarkv_sglang.bench.ucx_tools import RDMA_TRANSPORTS, offers
from polarkv_sglang.config import format_bytes
from polarkv_sglang.doctor.findings import Facts, Finding, from_error, one_line, without_library
from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.transport import Context
from polarkv_sglang.transport.library import find_helper, probe_system

INSTALL_MEND = (
    "install UCX 1.17 or later: pip install libucx-cu13, or name a libucp.so.0 by POLARKV_UCX_LIBRARY"
)

# Names that stand for several transports, and how the names of those begin.
_GROUPS = {
    "all": ("",),
    "ib": RDMA_TRANSPORTS,
    **dict.fromkeys(("shm", "sm", "mm"), ("posix", "sysv", "xpmem")),
    "cuda": ("cuda", "gdr"),
}
_WHEELS = ("libucx-cu13", "libucx-cu12", "libucx")
_DEVICES = Path("/sys/class/infiniband")
_DEVICE_FILES = Path("/dev/infiniband")
_CAP_IPC_LOCK = 1 << 14


def check_libucp(facts: Facts) -> Iterator[Finding]:
    try:
        library = facts.library
    except TransportError as error:
        # cffi goes on about where else it looked.
        reason = TransportError(one_line(error).partition(" Additionally, ctypes")[0])
        yield from_error("libucp", reason, INSTALL_MEND)
        return
    passed_over = _system_fault() if library.source == "wheel" else _wheel(library.source)
    version = ".".join(map(str, library.version))
    origin = {"explicit": "named by ucx_library", "system": "of the system", "wheel": "of the libucx wheel"}
    text = f"UCX {version} {origin[library.source]}: {library.path}"
    text += f"; passed over: {passed_over}" if passed_over else ""
    details = {"path": library.path, "source": library.source, "version": version, "passed_over": passed_over}
    yield Finding("libucp", "ok", text, details=details)


def check_helper(facts: Facts) -> Iterator[Finding]:
    mend = "install a C compiler and then the package again: pip install --force-reinstall --no-deps ."
    for name, find in ("batch helper", find_helper), ("node helper", load_native):
        try:
            path = find()[0]
        except TransportError as error:
            yield from_error(name, error, mend)
        else:
            yield Finding(name, "ok", f"compiled: {path}")


def check_transports(facts: Facts) -> Iterator[Finding]:
    if not facts.has_library:
        yield without_library("transports")
        return
    library, tls = facts.library, facts.settings.ucx_tls
    Context(library, tls=tls).close()
    restricted = "".join(
        f", restricted by {name}={value}"
        for name, value in (
            ("POLARKV_UCX_TLS", tls),
            *((name, os.environ.get(name)) for name in ("UCX_TLS", "UCX_NET_DEVICES")),
        )
        if value
    )
    try:
        offered = facts.offered
    except TransportError as error:
        files = _module_folder(library.path).glob("libuct_*.so*")
        modules = ", ".join(sorted({file.name.partition(".")[0] for file in files})) or "none"
        yield Finding(
            "transports",
            "warning",
            f"UCX starts, but what it offers is not known: {error}; its modules: {modules}",
            "install ucx-utils of the same UCX to see",
        )
        return
    text = f"{', '.join(sorted(offered))}{restricted}"
    details = {"transports": offered}
    missing = _not_offered(tls or os.environ.get("UCX_TLS") or "all", offered)
    if "tcp" not in offered:
        mend = "bring a network device up and leave tcp in UCX_TLS and UCX_NET_DEVICES: it notices dead peers"
        yield Finding("transports", "failed", f"{text}: no tcp", mend, details)
    elif missing:
        mend = "take it out of the list, or see 'libucp' and 'rdma'; UCX goes on without it"
        yield Finding("transports", "warning", f"{text}: no {', '.join(missing)}", mend, details)
    else:
        yield Finding(
            "transports", "ok", f"{text}; tcp on {', '.join(sorted(offered['tcp']))}", details=details
        )


def check_rdma(facts: Facts) -> Iterator[Finding]:
    devices = {device.name: _ports(device) for device in sorted(_listed(_DEVICES))}
    spelled = ", ".join(f"{name} ({', '.join(ports) or 'no port'})" for name, ports in devices.items())
    details = {"devices": devices}
    active = any("ACTIVE" in port for ports in devices.values() for port in ports)
    usable = _offers_rdma(facts)
    if not devices:
        text = "no device on this host: other hosts are reached over tcp"
        yield Finding("rdma", "ok", text, details=details)
    elif not active:
        mend = "bring a link up (ip link, rdma link; cable, switch); until then the pool uses tcp"
        yield Finding("rdma", "warning", f"{spelled}: no port is active", mend, details)
    elif not any(os.access(file, os.R_OK | os.W_OK) for file in _listed(_DEVICE_FILES, "uverbs*")):
        mend = "give this user or container the devices in /dev/infiniband; until then the pool uses tcp"
        yield Finding(
            "rdma", "warning", f"{spelled}: {_DEVICE_FILES}/uverbs* cannot be opened", mend, details
        )
    elif not usable:
        yield Finding(
            "rdma",
            "warning",
            f"{spelled}: the UCX in use has no RDMA",
            "install a UCX of 1.17 or later with verbs, such as the vendor's, or name one by "
            "POLARKV_UCX_LIBRARY (the wheel has none); until then the pool uses tcp",
            details,
        )
    else:
        yield Finding("rdma", "ok", f"{spelled}, usable by UCX", details=details)


def check_locked_memory(facts: Facts) -> Iterator[Finding]:
    """RDMA pins what it registers: a whole slab, a whole host pool."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    details = {"soft_bytes": None if soft == resource.RLIM_INFINITY else soft}
    if soft == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK):
        free = "" if soft == resource.RLIM_INFINITY else ", which does not bind this user (CAP_IPC_LOCK)"
        yield Finding("locked memory", "ok", f"limit {limit}{free}", details=details)
    elif not _offers_rdma(facts):
        text = f"limit {limit}; it binds RDMA only, which is not used here"
        yield Finding("locked memory", "ok", text, details=details)
    else:
        yield Finding(
            "locked memory",
            "failed",
            f"limit {limit}: RDMA can register no more, and a node registers all of its capacity",
            "ulimit -l unlimited, LimitMEMLOCK=infinity in the service, --ulimit memlock=-1 for a container",
            details,
        )


def _not_offered(tls: str, offered: Iterable[str]) -> list[str]:
    """Names in a list of transports that UCX would go on without."""
    names = [] if tls.startswith("^") else [name.strip().lstrip("\\") for name in tls.split(",")]
    # What UCX calls rc_x, ucx_info calls rc_mlx5.
    meant = {name: _GROUPS.get(name, (name.partition("_")[0],)) for name in names if name}
    return [name for name, prefixes in meant.items() if not any(one.startswith(prefixes) for one in offered)]


def _system_fault() -> str:
    """Why the system's libucp was passed over."""
    found = probe_system()
    why = found if isinstance(found, str) else f"UCX {'.'.join(map(str, found))}"
    return f"the system's ({why.removeprefix('OSError: ')})"


def _wheel(preferred: str) -> str | None:
    """The wheel that is installed but not used; None if there is none."""
    if importlib.util.find_spec("libucx") is None:
        return None
    for name in _WHEELS:
        try:
            return f"the wheel {name} {importlib.metadata.version(name)} ({preferred} goes first)"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"the wheel ({preferred} goes first)"


def _module_folder(library_path: str) -> Path:
    return Path(library_path).resolve().parent / "ucx"


def _offers_rdma(facts: Facts) -> bool:
    """By ucx_info, else by whether UCX has the module."""
    if not facts.has_library:
        return False
    try:
        return offers(facts.offered, "rdma")
    except TransportError:
        return any(_module_folder(facts.library.path).glob("libuct_ib*.so*"))


def _ports(device: Path) -> list[str]:
    """State, link layer and rate of each port, such as ``ACTIVE InfiniBand 200 Gb/sec (4X HDR)``."""
    ports = []
    for port in sorted(_listed(device / "ports")):
        state, layer, rate = (_read(port / name) for name in ("state", "link_layer", "rate"))
        ports.append(f"{state.partition(': ')[2] or state} {layer} {rate}".strip())
    return ports


def _listed(folder: Path, pattern: str = "*") -> list[Path]:
    return list(folder.glob(pattern)) if folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _has_capability(mask: int) -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) & mask)
    return False
