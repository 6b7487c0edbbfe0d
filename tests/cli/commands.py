"""Runs the real ``polarkv`` command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from polarkv_sglang.transport import load_library

DEADLINE_S = 60.0
COMMAND = [sys.executable, "-m", "polarkv_sglang.cli"]
_FORKS = """
import json, os, sys, tempfile
from polarkv_sglang.cli import main

done = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        if (child := os.fork()) == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.exit(main(arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        errors.seek(0)
        done.append((arguments, code, output.read(), errors.read()))
json.dump(done, sys.stdout)
"""


def environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without settings of PolarKV, and ``added``."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("POLARKV_")}
    return bare | dict(added or {})


def polarkv(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, env=environment(env)
    )


def polarkv_each(commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Each in a process of its own, a fork of one that has imported the command: that takes the longest."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS],
        input=json.dumps(commands),
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        env=environment(),
        check=True,
    )
    return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]


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
