"""Names of blocks: all that must match is in them, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import torch

from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import (
    KEY_BYTES,
    NO_PARENT,
    Namespace,
    block_keys,
    digest_adapter,
    digest_config,
    fingerprint_weights,
)
from polarkv_sglang.pool.blocks import chain

NAMESPACE = Namespace(
    weights="w",
    model_config="c",
    kv_dtype="torch.bfloat16",
    page_tokens=16,
    block_bytes=4096,
    block_layout="MHATokenToKVPoolHost/page_first_direct",
    tp_rank=0,
    tp_size=2,
    pp_rank=0,
    pp_size=2,
    cp_rank=0,
    cp_size=2,
)
PAGE_HASHES = [hashlib.sha256(str(page).encode()).hexdigest() for page in range(4)]


@pytest.mark.parametrize("field", Namespace.__struct_fields__)
def test_every_field_of_the_namespace_tells_blocks_apart(field: str) -> None:
    value = getattr(NAMESPACE, field)
    other = msgspec.structs.replace(NAMESPACE, **{field: value + ("x" if isinstance(value, str) else 1)})
    mine, theirs = block_keys(NAMESPACE.digest(), PAGE_HASHES), block_keys(other.digest(), PAGE_HASHES)
    assert not set(mine) & set(theirs)


def test_a_namespace_with_a_gap_is_refused() -> None:
    with pytest.raises(PolarError, match="weights"):
        msgspec.structs.replace(NAMESPACE, weights="")


def test_keys_are_stable_across_processes_and_versions() -> None:
    # A change here orphans every block in every pool: raise BLOCK_FORMAT instead, on purpose.
    keys = block_keys(bytes(32), ["00" * 32])
    assert keys == [hashlib.sha256(bytes(64)).digest()[:KEY_BYTES]]


def test_a_chain_knows_parents_and_stripes() -> None:
    keys = block_keys(NAMESPACE.digest(), [hashlib.sha256(bytes([page])).hexdigest() for page in range(10)])
    whole = chain([], keys, 4)
    assert whole.parents == [NO_PARENT, *keys[:-1]]
    assert whole.anchors == [keys[0]] * 4 + [keys[4]] * 4 + [keys[8]] * 2
    # However a prefix is cut into batches, a page has the same parent and stripe.
    for cut in range(1, 10):
        tail = chain(keys[:cut], keys[cut:], 4)
        assert tail.parents == whole.parents[cut:]
        assert tail.anchors == whole.anchors[cut:]


def test_weights_are_named_by_every_byte_name_and_shape() -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    base = fingerprint_weights(tensors.items())
    assert fingerprint_weights(reversed(tensors.items())) == base
    assert fingerprint_weights({name: tensor.clone() for name, tensor in tensors.items()}.items()) == base
    for changed in (
        {**tensors, "a": tensors["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {**tensors, "b": tensors["b"].to(torch.float16)},
        {**tensors, "b": tensors["b"].reshape(3, 2)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ):
        assert fingerprint_weights(changed.items()) != base


def test_a_config_is_named_by_content_not_by_place() -> None:
    config: dict[str, object] = {"rope_theta": 1e4, "_name_or_path": "/a", "transformers_version": "5"}
    assert digest_config({**config, "_name_or_path": "/b", "transformers_version": "6"}) == digest_config(
        config
    )
    assert digest_config({**config, "rope_theta": 1e6}) != digest_config(config)


def test_an_adapter_is_named_by_content_not_by_place(tmp_path: Path) -> None:
    def adapter(name: str, weights: bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder

    first = digest_adapter(adapter("first", b"1"))
    assert digest_adapter(adapter("copy", b"1")) == first
    assert digest_adapter(adapter("trained on", b"2")) != first
