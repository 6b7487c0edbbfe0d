"""The ``polarkv`` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from polarkv_sglang import __version__
from polarkv_sglang.cli import node, status
from polarkv_sglang.errors import ConfigError, PolarError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="polarkv", description="A distributed memory pool for SGLang's KV cache."
    )
    parser.add_argument("--version", action="version", version=f"polarkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (node, status):
        subparser = command.add_parser(commands)
        subparser.add_argument(
            "--token",
            help="Shared secret of the pool. Better given as POLARKV_TOKEN: flags can be seen by others.",
        )
        subparser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        if args.token == "":
            raise ConfigError("--token is empty; leave it out to run without one")
        args.token = args.token or os.environ.get("POLARKV_TOKEN") or None
        return int(args.run(args))
    except PolarError as error:
        print(f"polarkv: {error}", file=sys.stderr)
        return 2
