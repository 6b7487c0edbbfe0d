"""SGLang's radix cache with the memory pool below it."""

from __future__ import annotations

from polarkv_sglang.radix.cache import PolarRadixCache
from polarkv_sglang.radix.policy import CostPolicy, Decision, NodeView, Rates, SpillPolicy

__all__ = ["CostPolicy", "Decision", "NodeView", "PolarRadixCache", "Rates", "SpillPolicy"]
