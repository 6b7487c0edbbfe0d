"""PolarKV for SGLang: one KV cache for a whole inference cluster."""

from __future__ import annotations

__version__ = "0.1.0"
