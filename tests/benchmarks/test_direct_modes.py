"""The comparison of the two modes: what it prints of what it measured."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.direct_modes import Round, engine_flags, summary


def test_ratios_are_medians_over_rounds() -> None:
    rounds = [Round("direct", "shm", 3000, 2992, restored, 0.1) for restored in (0.2, 0.1, 0.9)]
    rounds += [Round("hicache", "shm", 3000, 2992, 0.4, 0.1)]
    text = summary(rounds)
    assert "direct over shm: 2992 tokens restored in 200 ms (100-900), L1 hit 100 ms" in text
    assert "restored / L1 hit 2.00" in text
    assert text.endswith("direct / hicache: 0.50")


def test_engines_differ_in_the_mode_only() -> None:
    direct, hicache = (set(engine_flags(mode, 7411, "tcp")) for mode in ("direct", "hicache"))
    assert direct - hicache == {"direct"}
    assert {flag for flag in hicache - direct if not flag.startswith("--hicache")} == {
        "hicache", "2", "page_first_direct",
    }  # fmt: skip


def test_a_model_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks.direct_modes", "--model", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "there is no nowhere" in done.stderr
