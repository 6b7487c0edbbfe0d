"""The exceptions that users of PolarKV can meet."""

from __future__ import annotations

import sys
from typing import Final, NoReturn

ERROR_PREFIX: Final = "polarkv: error: "


class PolarError(Exception):
    """Base of all errors that PolarKV raises on purpose; the text names the value, the limit, the way out."""


class ConfigError(PolarError):
    """A setting is unknown, malformed or out of range; raised before any model is loaded."""


class IncompatibleSGLang(PolarError):
    """The installed SGLang lacks a surface that PolarKV builds on; raised before any model is loaded."""


class TransportError(PolarError):
    """UCX cannot be loaded or used, or refused an operation; no data was delivered."""


class NodeError(PolarError):
    """A memory node cannot be used: absent, refused us, speaks another version, or closed the connection."""


def end_with(error: PolarError) -> NoReturn:
    """End the process as argparse does for a wrong flag: one line on stderr, no trace, exit status 2.

    Where SGLang calls its plugins it logs any other exception, and goes on without the plugin.
    """
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
    raise SystemExit(2) from error
