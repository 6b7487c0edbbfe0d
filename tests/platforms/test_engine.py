"""SGLang with HiCache on our platform, without a pool: every tier gives what a recompute gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.platforms.engine import running_engine
from tests.tiny_models import ARCHITECTURES, build

L1_TOKENS = 2048
PROMPT = "The keeper of the lighthouse wrote down every ship that passed, and its course. " * 12

# Single precision: random weights have near ties, which half precision decides by the shape of a batch.
FLAGS = ("--dtype", "float32", "--enable-hierarchical-cache", "--hicache-ratio", "3")


@pytest.mark.engine
@pytest.mark.timeout(360)
@pytest.mark.parametrize("ranks", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hits_in_l1_and_l2_answer_like_a_recompute(arch: str, ranks: int, tmp_path: Path) -> None:
    # GLM-4.5 is served with pages of 64.
    page_tokens = 64 if arch == "glm4_moe" else 16
    limits = ("--page-size", str(page_tokens), "--max-total-tokens", str(L1_TOKENS), "--tp", str(ranks))
    model = build(arch, tmp_path / arch)
    with running_engine(model, tmp_path / "engine.log", *FLAGS, *limits) as engine:
        first = engine.generate(PROMPT)
        assert first.cached == {}
        assert len(set(first.tokens)) > 4, "the model answers the same token again and again"
        whole_pages = (first.prompt_tokens - 1) // page_tokens * page_tokens

        from_l1 = engine.generate(PROMPT)
        assert (from_l1.tokens, from_l1.cached) == (first.tokens, {"device": whole_pages, "host": 0})

        others = 0
        while others < L1_TOKENS:  # and less than L2 holds
            other = engine.generate(f"{others} " + PROMPT[::-1], new_tokens=1)
            assert other.cached == {}
            others += other.prompt_tokens
        from_l2 = engine.generate(PROMPT)
        assert from_l2.tokens == first.tokens
        assert from_l2.cached["host"] > 0
        assert sum(from_l2.cached.values()) == whole_pages

        engine.flush()
        recomputed = engine.generate(PROMPT)
        assert (recomputed.tokens, recomputed.cached) == (first.tokens, {})
