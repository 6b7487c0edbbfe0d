from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.smollm2 import checkpoint_name, prepare, unpermute


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k projections."""
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (9, 64)])
def test_unpermute_undoes_llama_cpp(heads, head_dim):
    weight = np.arange(heads * head_dim * 5, dtype=np.float32).reshape(heads * head_dim, 5)
    assert np.array_equal(unpermute(llama_cpp_permute(weight, heads), heads), weight)


def test_unpermute_brings_rotated_pairs_half_a_head_apart():
    # llama.cpp rotates rows (0, 1), (2, 3), ... of a head together.
    weight = np.array([[0], [1], [2], [3], [4], [5]], dtype=np.float32)
    assert unpermute(weight, heads=1).ravel().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.29.attn_q.weight", "model.layers.29.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_tensors_get_their_hugging_face_names(gguf_name, name):
    assert checkpoint_name(gguf_name) == name


def test_a_tensor_that_llama_lacks_is_refused():
    with pytest.raises(KeyError):
        checkpoint_name("blk.0.attn_q.bias")


def test_a_prepared_model_is_left_alone(tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    assert prepare(target) == target
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_converted_model_answers_and_leaves_no_scratch(tmp_path: Path):
    target = prepare(tmp_path / "model")  # raises if the answer is wrong
    assert {file.name for file in target.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert list(tmp_path.iterdir()) == [target]
