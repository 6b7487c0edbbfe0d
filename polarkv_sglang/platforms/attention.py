"""Attention over SGLang's paged KV in plain PyTorch, for the rows that are new."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class SuffixAttnBackend(TorchNativeAttnBackend):
    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        q = query.movedim(0, query.dim() - 2)
        s = 0
        for rp, L, p, n in zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist()):
            idx = req_to_token[rp, :L]
            k = k_cache[idx].movedim(0, 1).to(q.dtype)
            v = v_cache[idx].movedim(0, 1).to(q.dtype)
            m = None
            if causal and p:
                m = torch.arange(L).view(1, L) <= torch.arange(p, L).view(n, 1)
            o = scaled_dot_product_attention(q[None, :, s : s + n], k[None], v[None], attn_mask=m, enable_gqa=enable_gqa, scale=scaling, is_causal=causal and p == 0)
            output[s : s + n] = o[0].movedim(1, 0)
            s += n
        return output
