"""The ``polarkv`` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from polarkv_sglang import __version__
from polarkv_sglang.cli import bench, blend_check, doctor, node, status
from polarkv_sglang.errors import ConfigError, PolarError

_TLS_FILES = {
    "cert": "TLS on the control plane: our certificate, PEM",
    "key": "Its key",
    "ca": "The authority that has to have signed the other side's certificate",
}
# Options that count as POLARKV_* where they are left out.
_VARIABLES = ("token", *(f"tls_{name}" for name in _TLS_FILES), "ucx_library", "ucx_tls")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="polarkv", description="A distributed memory pool for SGLang's KV cache."
    )
    parser.add_argument("--version", action="version", version=f"polarkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (node, status, doctor, bench, blend_check):
        subparser = command.add_parser(commands)
        if command is not blend_check:
            _add_secrets(subparser)
        level = getattr(command, "LOG_LEVEL", "info")
        subparser.add_argument(
            "--log-level", default=level, choices=("debug", "info", "warning", "error", "critical")
        )
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Until a command has a better way to end, it ends as by Ctrl-C, and so do the processes that it started.
    signal.signal(signal.SIGTERM, _interrupt)
    # Standard output is for our tables and JSON.
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    try:
        if getattr(args, "token", None) == "":
            raise ConfigError("--token is empty; leave it out to run without one")
        for name in _VARIABLES:
            if name in args:
                given = getattr(args, name) or os.environ.get(f"POLARKV_{name.upper()}")
                setattr(args, name, given or None)
        code = int(args.run(args))
        sys.stdout.flush()
    except PolarError as error:
        print(f"polarkv: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        logging.debug("where it failed:", exc_info=True)
        print(f"polarkv: {error}; polarkv doctor says what is missing", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read us has seen enough; Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _add_secrets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token",
        help="Shared secret of the pool. Better given as POLARKV_TOKEN: flags can be seen by others.",
    )
    for name, text in _TLS_FILES.items():
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=f"{text} (or POLARKV_TLS_{name.upper()}).")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
