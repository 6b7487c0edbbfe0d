"""Every architecture that we promise, alone and over two ranks, restores a prompt from the pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_models
from tests.engine.servers import prompt, running_server
from tests.support import running_node

PAGE_TOKENS = {"llama": 16, "qwen3": 16, "glm4_moe": 64, "deepseek_v2": 16}


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2], ids=["TP=1", "TP=2"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm4_moe", "deepseek_v2"])
def test_a_prompt_is_restored_with_equal_output(architecture: str, ranks: int, tmp_path: Path) -> None:
    model = tiny_models.build(architecture, tmp_path / "model")
    flags = ["--page-size", str(PAGE_TOKENS[architecture])]
    environment = {}
    if ranks == 2:
        flags += ["--tp", "2"]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    asked = prompt(1, 700)
    whole = len(asked) - 1 - (len(asked) - 1) % PAGE_TOKENS[architecture]
    with (
        running_node("128MiB") as node,
        running_server(
            model,
            tmp_path / "server.log",
            "--polarkv-nodes",
            node.address,
            *flags,
            environment=environment,
        ) as server,
    ):
        computed = server.generate(asked)
        assert computed.tiers is not None
        assert computed.tiers.computed == len(asked)
        from_l1 = server.generate(asked)
        assert from_l1.tiers is not None
        assert from_l1.tiers.l1 == whole
        restored = server.generate_from_pool(asked, at_least=whole)
        assert restored.output_ids == computed.output_ids == from_l1.output_ids
        assert len(set(computed.output_ids)) > 1, "the model says one token only: equality proves little"
        # A longer prompt reuses the restored prefix and computes the rest.
        longer = [*asked, *prompt(2, 300)]
        extended = server.generate_from_pool(longer, at_least=whole)
        server.flush()
        assert server.generate(longer).output_ids == extended.output_ids
        # Rank-replicated KV (MLA) is written once, sharded KV by every rank.
        assert node.statistics().corrupt_total == 0
