"""What a linker keeps for requests: no longer than it is of use."""

from __future__ import annotations

import time

from polarkv_sglang.hicache.loads import Plan, Plans
from polarkv_sglang.pool.blocks import Chain


def a_plan(age_s: float) -> Plan:
    return Plan(b"", ["page"], Chain([b""], [b""], [b""]), 0, time.monotonic() - age_s)


def test_plans_of_requests_that_never_loaded_are_dropped() -> None:
    plans = Plans()
    for number in range(100):
        plans.keep(f"missed {number}", a_plan(age_s=60))
    plans.keep("fresh", a_plan(age_s=1))
    plans.keep("another", a_plan(age_s=0))
    assert len(plans) == 2
    assert plans.find("fresh", b"") is not None
    assert plans.find("another", b"") is not None
