"""Rotations are read from the rotary embeddings that SGLang has, or refused."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import (
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

from polarkv_sglang.blend.model import Unsupported, rotary_of
from polarkv_sglang.kernels.rotate import Moves, rotate_keys

DIM, ROTATED, LENGTH, BASE = 16, 8, 4096, 10_000


def embeddings(neox: bool) -> dict[str, RotaryEmbedding]:
    shape = (DIM, ROTATED, LENGTH, BASE, neox)
    return {
        "plain": RotaryEmbedding(*shape, torch.float32),
        "llama3": Llama3RotaryEmbedding(*shape, torch.float32, 8.0, 1.0, 4.0, 1024),
        "yarn": YaRNScalingRotaryEmbedding(*shape, 4.0, torch.float32),
    }


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("kind", ["plain", "llama3", "yarn"])
def test_moved_keys_are_those_that_the_embedding_makes(kind: str, neox: bool) -> None:
    embedding = embeddings(neox)[kind]
    plain = torch.randn(5, 2 * DIM, generator=torch.Generator().manual_seed(1))
    old, new = torch.arange(5) + 7, torch.arange(5) + 2900

    def keys_at(positions: torch.Tensor) -> torch.Tensor:
        _, keys = embedding.forward_native(positions, plain.clone(), plain.clone())
        return keys.view(5, 2, DIM)

    moved = torch.empty(5, 2, DIM)
    rows = torch.arange(5)
    rotate_keys(keys_at(old), moved, Moves(rows, rows, old, new), rotary_of(embedding, "cpu"))
    torch.testing.assert_close(moved, keys_at(new), atol=2e-3, rtol=0)


def test_angles_that_are_not_position_times_a_frequency_are_refused() -> None:
    shape = (DIM, ROTATED, LENGTH, BASE, True)
    for embedding in (
        LinearScalingRotaryEmbedding(*shape, [2.0], torch.float32),
        DynamicNTKScalingRotaryEmbedding(*shape, 4.0, torch.float32),
        object(),
    ):
        with pytest.raises(Unsupported):
            rotary_of(embedding, "cpu")
