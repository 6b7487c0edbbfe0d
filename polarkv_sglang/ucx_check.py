"""Whether UCX starts with an engine's settings, found out before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

from polarkv_sglang.errors import ERROR_PREFIX, ConfigError, PolarError, end_with

_DEADLINE_S = 60.0


def check_ucx(*, tls: str | None, library: str | None) -> None:
    """Raises ConfigError, which names the value, if these transports or this libucp cannot be used.

    Another process tries them, and ends: UCX leaves threads and changed memory functions behind, and a
    library that is not UCX may do anything.
    """
    chosen = {"ucx_tls": tls, "ucx_library": library}
    settings = " and ".join(f"{name} {value!r}" for name, value in chosen.items() if value is not None)
    command = [sys.executable, "-m", "polarkv_sglang.ucx_check", json.dumps([tls, library])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"UCX does not start within {_DEADLINE_S:g} s with {settings}") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ConfigError(f"UCX cannot be used with {settings}: {said.removeprefix(ERROR_PREFIX)}")


def _start() -> None:
    from polarkv_sglang.transport import Context, Worker, load_library

    tls, library = json.loads(sys.argv[1])
    try:
        context = Context(load_library(library), tls=tls)
        Worker(context)
        context.close()
    except PolarError as error:
        # cffi goes on about where else it looked.
        text = " ".join(str(error).split()).partition(" Additionally, ctypes")[0]
        end_with(PolarError(text))


if __name__ == "__main__":
    _start()
