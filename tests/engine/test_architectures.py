"""Every architecture that we promise, alone and over two ranks: every tier answers like a recompute."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.common import tiny_models
from tests.engine.servers import Server, prompt, running_server
from tests.support import running_node

PAGE_TOKENS = {"llama": 16, "qwen3": 16, "glm4_moe": 64, "deepseek_v2": 16}
L1_TOKENS = 2048
# GLM-4.5 stands for MHA, DeepSeek-V2 for MLA, whose KV one of two ranks writes; what two do, one does too.
QUICK = {("glm4_moe", 2), ("deepseek_v2", 2)}
CASES = [
    pytest.param(architecture, ranks, marks=() if (architecture, ranks) in QUICK else pytest.mark.slow)
    for architecture in tiny_models.ARCHITECTURES
    for ranks in (1, 2)
]


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("architecture", "ranks"), CASES)
def test_every_tier_answers_like_a_recompute(architecture: str, ranks: int, tmp_path: Path) -> None:
    model = tiny_models.build(architecture, tmp_path / "model")
    page_tokens = PAGE_TOKENS[architecture]
    flags = ("--page-size", str(page_tokens), "--max-total-tokens", str(L1_TOKENS), "--tp", str(ranks))
    with (
        running_node("128MiB") as node,
        running_server(model, tmp_path / "server.log", "--polarkv-nodes", node.address, *flags) as server,
    ):
        asked = prompt(1, 700)
        whole = (len(asked) - 1) // page_tokens * page_tokens
        computed = server.generate(asked)
        assert computed.tiers is not None
        assert computed.tiers.computed == len(asked)
        assert len(set(computed.output_ids)) > 1, "the model says one token only: equality proves little"

        from_l1 = server.generate(asked)
        assert from_l1.tiers is not None
        assert from_l1.tiers.l1 == whole
        assert from_l1.output_ids == computed.output_ids

        fill_l1(server)
        from_l2 = server.generate(asked)
        assert from_l2.tiers is not None
        assert from_l2.tiers.l2 > 0
        assert from_l2.tiers.l1 + from_l2.tiers.l2 == whole
        assert from_l2.output_ids == computed.output_ids

        restored = server.generate_from_pool(asked, at_least=whole)
        assert restored.output_ids == computed.output_ids

        # A longer prompt reuses the restored prefix and computes the rest.
        longer = [*asked, *prompt(2, 300)]
        extended = server.generate_from_pool(longer, at_least=whole)
        assert server.generate(longer).output_ids == extended.output_ids
        assert node.statistics().corrupt_total == 0


def fill_l1(server: Server) -> None:
    """Push everything else out of L1, with less than L2 holds."""
    for seed in range(10, 10 + L1_TOKENS // 600 + 1):
        server.generate(prompt(seed, 600), max_new_tokens=1)
