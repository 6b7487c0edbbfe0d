"""Our attention against a plain one in double precision, on paged pools as SGLang passes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from polarkv_sglang.platforms.attention import RequestKV, SuffixAttnBackend, attend

CONTEXT = 2048


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False  # values are the front of the keys, as in MLA


class Request(NamedTuple):
    prefix: int  # tokens whose KV is cached
    new: int


class Batch:
    """Several requests whose tokens lie scattered over the pools, in pages of 16."""

    def __init__(self, shape: Shape, requests: list[Request], dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape, self.requests = shape, requests
        pages = [-(-(r.prefix + r.new) // 16) for r in requests]
        order = torch.randperm(sum(pages)) + 1
        slots = 16 * (sum(pages) + 1)
        self.k_cache = torch.randn(slots, shape.kv_heads, shape.key_dim).to(dtype)
        if shape.latent:
            self.v_cache = self.k_cache[..., : shape.value_dim]
        else:
            self.v_cache = torch.randn(slots, shape.kv_heads, shape.value_dim).to(dtype)
        self.req_to_token = torch.zeros(len(requests) + 2, CONTEXT, dtype=torch.int32)
        # Not rows 0, 1, 2: a backend that ignores the indices would pass.
        self.rows = torch.arange(len(requests) + 1, 1, -1)
        for row, mine in zip(self.rows.tolist(), order.split(pages), strict=True):
            tokens = (mine[:, None] * 16 + torch.arange(16)).flatten()
            self.req_to_token[row, : len(tokens)] = tokens
        self.query = torch.randn(sum(r.new for r in requests), shape.heads, shape.key_dim).to(dtype)
        self.prefixes = torch.tensor([r.prefix for r in requests])
        self.new = torch.tensor([r.new for r in requests])

    @property
    def is_gqa(self) -> bool:
        return self.shape.heads != self.shape.kv_heads

    def extend(self, backend: TorchNativeAttnBackend, **options: object) -> torch.Tensor:
        output = torch.full((*self.query.shape[:2], self.shape.value_dim), torch.nan, dtype=self.query.dtype)
        backend._run_sdpa_forward_extend(
            self.query,
            output,
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.rows,
            self.prefixes + self.new,
            self.prefixes,
            self.new,
            **{"scaling": 0.1, "enable_gqa": self.is_gqa, "causal": True, **options},
        )
        return output

    def decode(self, backend: TorchNativeAttnBackend, **options: object) -> torch.Tensor:
        output = torch.full((*self.query.shape[:2], self.shape.value_dim), torch.nan, dtype=self.query.dtype)
        backend._run_sdpa_forward_decode(
            self.query,
            output,
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.rows,
            self.prefixes + self.new,
            **{"scaling": 0.1, "enable_gqa": self.is_gqa, **options},
        )
        return output

    def reference(self) -> torch.Tensor:
        outputs = []
        group = self.shape.heads // self.shape.kv_heads
        queries = self.query.double().split([r.new for r in self.requests])
        for request, row, query in zip(self.requests, self.rows.tolist(), queries, strict=True):
            total = request.prefix + request.new
            slots = self.req_to_token[row, :total].long()
            keys = self.k_cache[slots].double().repeat_interleave(group, 1)
            values = self.v_cache[slots].double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", query, keys) * 0.1
            future = torch.arange(total)[None] > torch.arange(request.prefix, total)[:, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)


SHAPES = {
    "mha": Shape(4, 4, 32, 32),
    "gqa": Shape(9, 3, 64, 64),
    "one kv head": Shape(8, 1, 32, 32),
    "narrow values": Shape(4, 2, 48, 32),
    "latent": Shape(4, 1, 80, 64, latent=True),
}
MIXED = [Request(0, 5), Request(37, 1), Request(0, 1), Request(600, 700), Request(100, 64), Request(0, 300)]


@pytest.fixture
def backend() -> SuffixAttnBackend:
    return SuffixAttnBackend(SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_mixed_batch_of_hits_and_misses_is_exact(backend: SuffixAttnBackend, shape: Shape) -> None:
    batch = Batch(shape, MIXED, torch.float32)
    torch.testing.assert_close(batch.extend(backend).double(), batch.reference(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_half_precision_stays_within_its_rounding(
    backend: SuffixAttnBackend, shape: Shape, dtype: torch.dtype
) -> None:
    batch = Batch(shape, MIXED, dtype)
    torch.testing.assert_close(batch.extend(backend).double(), batch.reference(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_decode_of_requests_of_different_lengths_is_exact(backend: SuffixAttnBackend, shape: Shape) -> None:
    batch = Batch(shape, [Request(0, 1), Request(700, 1), Request(16, 1), Request(15, 1)], torch.float32)
    torch.testing.assert_close(batch.decode(backend).double(), batch.reference(), rtol=1e-4, atol=1e-5)


def test_a_prompt_in_chunks_gets_what_it_gets_in_one_piece(backend: SuffixAttnBackend) -> None:
    whole = Batch(SHAPES["gqa"], [Request(0, 700)], torch.float32)
    expected = whole.extend(backend)
    query, pieces = whole.query, []
    for prefix, new in ((0, 256), (256, 256), (512, 188)):
        whole.prefixes, whole.new = torch.tensor([prefix]), torch.tensor([new])
        whole.query = query[prefix : prefix + new]
        pieces.append(whole.extend(backend))
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPES["gqa"], SHAPES["latent"]], ids=["gqa", "latent"])
def test_a_hit_sees_the_numbers_of_a_recompute_in_bf16(shape: Shape) -> None:
    torch.manual_seed(0)
    keys = torch.randn(1000, shape.kv_heads, shape.key_dim).bfloat16()
    kv = RequestKV(keys, keys if shape.latent else torch.randn_like(keys))
    query = torch.randn(1000, shape.heads, shape.key_dim).bfloat16()
    whole = torch.empty(1000, shape.heads, shape.value_dim, dtype=torch.bfloat16)
    attend(query, kv, None, whole)
    for hit in (16, 512, 960, 984):
        suffix = torch.empty_like(whole[hit:])
        attend(query[hit:], kv, None, suffix)
        assert torch.equal(suffix, whole[hit:])


def test_caches_of_another_dtype_are_read_in_the_dtype_of_the_query(backend: SuffixAttnBackend) -> None:
    batch = Batch(SHAPES["gqa"], MIXED, torch.bfloat16)
    batch.query = batch.query.float()
    torch.testing.assert_close(batch.extend(backend).double(), batch.reference(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"sliding_window_size": 20}, {"causal": False}], ids=["window", "encoder"]
)
def test_what_is_not_plain_causal_attention_is_left_to_sglang(
    backend: SuffixAttnBackend, options: dict[str, object]
) -> None:
    sglang = TorchNativeAttnBackend(
        SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    )
    requests = [Request(0, 40), Request(0, 7)]
    batch = Batch(SHAPES["gqa"], requests, torch.float32)
    assert torch.equal(batch.extend(backend, **options), batch.extend(sglang, **options))
