"""Runs the real ``polarkv`` command."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from polarkv_sglang.transport import load_library

DEADLINE_S = 60.0
COMMAND = [sys.executable, "-m", "polarkv_sglang.cli"]


def environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without settings of PolarKV, and ``added``."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("POLARKV_")}
    return bare | dict(added or {})


def polarkv(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, env=environment(env)
    )


def absent_address() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def ucx_without_tools(folder: Path) -> str:
    """A libucp that works and has no ucx_info or ucx_perftest beside it, as a distribution may install it."""
    source = Path(load_library().path).parent
    for library in source.glob("libuc*.so.0"):
        shutil.copy(library, folder)
    return str(folder / "libucp.so.0")
