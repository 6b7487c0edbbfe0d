"""Which memory nodes a pool has: a fixed list, or a file that an operator edits while engines run."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import ConfigError

logger = logging.getLogger(__name__)


def read_nodes(path: Path) -> tuple[str, ...]:
    """The addresses in a file: one ``host:port`` a line, ``#`` begins a comment.

    Raises ConfigError, which names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"nodes file {path} cannot be read: {error}") from error
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        address = line.partition("#")[0].strip()
        if not address:
            continue
        try:
            parse_address(address)
        except ConfigError as error:
            raise ConfigError(f"nodes file {path}, line {number}: {error}") from error
        if address in found:
            raise ConfigError(f"nodes file {path}, line {number}: {address} is there twice")
        found.append(address)
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from its own host; of names only ``localhost`` is known."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class NodeList:
    """The memory nodes as they are listed now. Used by one thread."""

    def __init__(self, nodes: Sequence[str], file: Path | None) -> None:
        """``file``, if given, replaces ``nodes``; ConfigError if it cannot be used at the start."""
        self._file = file
        self._seen = self._stamp()  # before it is read: a change in between is then seen later
        self.addresses = tuple(nodes) if file is None else read_nodes(file)

    def reload(self) -> bool:
        """Read the file again if it has changed; whether the list did. What is wrong changes nothing."""
        stamp = self._stamp()
        if self._file is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            addresses = read_nodes(self._file)
        except ConfigError as error:
            logger.error("PolarKV: %s; the memory nodes stay %s", error, ", ".join(self.addresses) or "none")
            return False
        changed = addresses != self.addresses
        self.addresses = addresses
        return changed

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes with the file's content; a file that is replaced by renaming has another inode."""
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
