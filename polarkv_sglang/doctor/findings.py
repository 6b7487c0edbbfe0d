"""What a check found, and what checks share."""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from polarkv_sglang.config import PolarConfig, load_config
from polarkv_sglang.errors import ConfigError, PolarError, TransportError

# Everything else is imported where it is used: what cannot be imported here is a finding, not the end.
if TYPE_CHECKING:
    from polarkv_sglang.transport import Library

State = Literal["ok", "warning", "failed"]

_logger = logging.getLogger(__name__)
_NO_DETAILS: Mapping[str, object] = MappingProxyType({})


class Finding(NamedTuple):
    """One line for the operator."""

    check: str
    state: State
    text: str
    mend: str = ""  # what to do; only where the state is not ok
    details: Mapping[str, object] = _NO_DETAILS  # figures and facts, for --json


class Facts:
    """What checks build on, each found out once. Used by one thread."""

    def __init__(
        self,
        nodes: Sequence[str],
        token: str | None,
        *,
        speed: bool,
        tls_files: tuple[str | None, str | None, str | None] = (None, None, None),
    ) -> None:
        self._nodes = tuple(nodes)
        self._token = token
        self._tls_files = tls_files
        self.speed = speed  # whether to measure, and to write to the nodes of a pool for that
        self.unchecked: dict[str, str] = {}  # checks that could not be imported, and why

    @functools.cached_property
    def config(self) -> PolarConfig:
        """What POLARKV_* and the config file say; ConfigError if it is wrong."""
        return load_config(environ=os.environ)

    @functools.cached_property
    def settings(self) -> PolarConfig:
        """The same, or the defaults where it is wrong: the check of the configuration tells that."""
        try:
            return self.config
        except ConfigError:
            return PolarConfig()

    @functools.cached_property
    def nodes(self) -> Sequence[str]:
        """Those named on the command line, else those configured; ConfigError if their file is wrong."""
        from polarkv_sglang.pool.nodes import read_nodes

        if self._nodes or self.settings.nodes_file is None:
            return self._nodes or self.settings.nodes
        return read_nodes(Path(self.settings.nodes_file))

    @property
    def token(self) -> str | None:
        return self._token or self.settings.token

    @property
    def tls_files(self) -> tuple[str | None, str | None, str | None]:
        """Certificate, key and authority, as far as they are given."""
        cert, key, ca = self._tls_files
        settings = self.settings
        return cert or settings.tls_cert, key or settings.tls_key, ca or settings.tls_ca

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """What to reach the nodes of the pool with; None also where the files are wrong, which is checked."""
        from polarkv_sglang.transport.tls import client_tls

        try:
            return client_tls(*self.tls_files)
        except ConfigError:
            return None

    @functools.cached_property
    def library(self) -> Library:
        """libucp, as engines would load it here; TransportError."""
        from polarkv_sglang.transport import load_library

        return load_library(self.settings.ucx_library)

    @functools.cached_property
    def has_library(self) -> bool:
        try:
            return bool(self.library)
        except TransportError:
            return False

    @functools.cached_property
    def offered(self) -> dict[str, list[str]]:
        """Transports that UCX offers here, and their devices; TransportError if that cannot be told."""
        from polarkv_sglang.bench.ucx_tools import offered_transports

        return offered_transports(self.library)


class Check(NamedTuple):
    name: str
    look: str  # a function from Facts to findings, as module:name inside this package
    mend: str  # for an error that brings no way out of its own


def examine(check: Check, facts: Facts) -> Iterator[Finding]:
    """The findings of one check, as it comes to them; whatever goes wrong is a finding too.

    Only a check whose imports fail is kept for ``unchecked``: one missing package would fail most of them.
    """
    try:
        yield from pkgutil.resolve_name(f"{__package__}.{check.look}")(facts)
    except ImportError as error:
        facts.unchecked[check.name] = one_line(error)
    except PolarError as error:
        yield from_error(check.name, error, check.mend)
    except Exception as error:
        _logger.debug("check %s", check.name, exc_info=True)
        yield Finding(
            check.name,
            "failed",
            f"the check itself failed: {type(error).__name__}: {one_line(error)}",
            "run again with --log-level debug and report what it says",
        )


def unchecked(facts: Facts) -> Iterator[Finding]:
    """One finding for all checks that could not be made."""
    if facts.unchecked:
        reasons = ", ".join(sorted(set(facts.unchecked.values())))
        text = f"{', '.join(facts.unchecked)}: {reasons}"
        yield Finding("not checked", "failed", text, "mend the packages first")


def from_error(check: str, error: PolarError, mend: str) -> Finding:
    """Failed. Our errors end with the way out, after a semicolon; ``mend`` is for those that do not."""
    text, separator, way_out = one_line(error).rpartition("; ")
    if not separator:
        return Finding(check, "failed", way_out, mend)
    # A question is not a way out.
    return Finding(check, "failed", text, mend if way_out.endswith("?") else way_out)


def without_library(check: str) -> Finding:
    """Failed only because libucp cannot be used: one cause, told once."""
    return Finding(check, "failed", "not possible without libucp", "mend libucp first")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
