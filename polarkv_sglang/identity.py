"""Names of KV: everything that must match before a block may be reused, folded into a 16-byte key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from polarkv_sglang.errors import PolarError

if TYPE_CHECKING:
    import torch

KEY_BYTES = 16
NO_PARENT = bytes(KEY_BYTES)
# Raised whenever the bytes of a block, or how it is named, change: old blocks then no longer hit.
BLOCK_FORMAT = 1


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a page hash of SGLang does not hold and KV depends on.

    The page hash covers tokens, cache salt, extra key and LoRA adapter (SGLang 0.5.23,
    ``mem_cache/utils.py``). A field too many costs a miss, a field too few a wrong token: when in
    doubt it is here.
    """

    weights: str  # fingerprint of the parameters of all ranks, as they lie in memory
    model_config: str  # digest of the Hugging Face config: rope scaling changes KV, not weights
    kv_dtype: str  # of the device pool, as torch prints it
    page_tokens: int
    block_bytes: int
    block_layout: str  # order of the bytes inside a block
    # Shard that the block holds. Rank-replicated KV (MLA) is the same on all ranks of a tensor-parallel
    # group: tp_rank is 0 there.
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    block_format: int = BLOCK_FORMAT

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) in ("", None):
                raise PolarError(f"namespace without {name}: KV without a full identity is never shared")

    def digest(self) -> bytes:
        """32 bytes that stand for all fields."""
        return hashlib.sha256(b"polarkv-namespace\0" + msgspec.json.encode(self, order="sorted")).digest()


def block_keys(namespace_digest: bytes, page_hashes: Sequence[str]) -> list[bytes]:
    """Keys of pages: SHA-256(namespace, SGLang's chained page hash), cut to ``KEY_BYTES``.

    ``page_hashes`` are the hexadecimal digests that HiCache gives its storage. SHA-256 because a
    tenant who could make two prefixes collide could read another's KV.
    """
    base = hashlib.sha256(namespace_digest)
    keys = []
    for page_hash in page_hashes:
        key = base.copy()
        key.update(bytes.fromhex(page_hash))
        keys.append(key.digest()[:KEY_BYTES])
    return keys


def fingerprint_weights(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hexadecimal digest of named parameters: names, dtypes, shapes and every byte.

    Hashed where they lie: on a CUDA device by SGLang's hash kernel, elsewhere on the host by xxh3.
    The two do not agree, so engines on different kinds of device do not share KV.
    """
    whole = hashlib.sha256(b"polarkv-weights\0")
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        header = f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0"
        whole.update(header.encode() + _tensor_digest(parameter.detach()))
    return whole.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    import torch

    if tensor.numel() == 0:
        return b""
    if tensor.is_cuda:
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

        return int(gpu_tensor_hash(tensor)).to_bytes(16, "big")
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return bytes(xxhash.xxh3_128_digest(flat.numpy().data))


def digest_config(config: dict[str, object]) -> str:
    """Digest of a Hugging Face config, without the fields that name a place and not a model."""
    places = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}
    kept = {name: value for name, value in config.items() if name not in places}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_adapter(folder: Path) -> str:
    """Digest of a LoRA adapter's files (config and weights), whatever the folder is called."""
    whole = hashlib.sha256(b"polarkv-adapter\0")
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin", ".pt")]
    for path in sorted(files):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        whole.update(str(path.relative_to(folder)).encode() + b"\0" + digest.digest())
    return whole.hexdigest()
