"""The exceptions that users of PolarKV can meet."""

from __future__ import annotations


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
