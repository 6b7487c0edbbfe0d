"""UCX's own tools, run with the libucp that we use, and what ``ucx_info`` tells of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.library import Library

RDMA_TRANSPORTS = ("rc_", "dc_", "ud_")  # how the names of those over InfiniBand and RoCE begin

_INFO_DEADLINE_S = 30.0
_INFO_LINE = re.compile(r"#\s+(?P<what>Transport|Device): (?P<name>\S+)")


def find_tool(library: Library, name: str) -> str | None:
    """Path of a tool that comes with this libucp, else of the one on the PATH; None if there is none."""
    beside = Path(library.path).resolve().parent.parent / "bin" / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def tool_environment(library: Library, ucx_tls: str | None) -> dict[str, str]:
    """Makes a tool use this libucp, whichever it was built with, and these transports."""
    folder = str(Path(library.path).resolve().parent)
    inherited = os.environ.get("LD_LIBRARY_PATH")
    environ = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{inherited}" if inherited else folder}
    return environ if ucx_tls is None else environ | {"UCX_TLS": ucx_tls}


def offered_transports(library: Library) -> dict[str, list[str]]:
    """Transports that UCX offers on this host, with the devices of each, by ``ucx_info``.

    TransportError if there is no ``ucx_info`` or it does not run.
    """
    tool = find_tool(library, "ucx_info")
    if tool is None:
        raise TransportError("there is no ucx_info; the libucx-cu13 wheel and Debian's ucx-utils have it")
    try:
        done = subprocess.run(
            [tool, "-d"],
            env=tool_environment(library, None),
            capture_output=True,
            text=True,
            timeout=_INFO_DEADLINE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TransportError(f"{tool} -d did not run: {error}") from error
    offered: dict[str, list[str]] = {}
    devices: list[str] = []
    for line in _INFO_LINE.finditer(done.stdout):
        if line["what"] == "Transport":
            devices = offered.setdefault(line["name"], [])
        else:
            devices.append(line["name"])
    return offered


def offers(offered: dict[str, list[str]], transport: str) -> bool:
    """Whether one of the transports is ``transport`` of ``polarkv bench``."""
    match transport:
        case "rdma":
            return any(name.startswith(RDMA_TRANSPORTS) for name in offered)
        case "cma":
            return "cma" in offered
        case _:
            return True
