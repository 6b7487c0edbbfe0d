"""HiCache's storage tier on the memory pool (L2 <-> L3), and the linker of direct mode (L1 <-> L3)."""

from __future__ import annotations

from polarkv_sglang.hicache.storage import PolarStorage

__all__ = ["PolarStorage"]
