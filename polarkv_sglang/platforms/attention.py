"""Attention over SGLang's paged KV in plain PyTorch, computed for new tokens only.

SGLang's ``torch_native`` backend computes the rows of a cached prefix again and throws them away: a full hit
costs as much attention as no hit. Here only new rows are computed, by PyTorch's flash kernel, whose result
for a row does not depend on the rows computed with it: a hit and a recompute see the same numbers.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import pad, scaled_dot_product_attention

# Rows per call after a prefix: enough to keep the kernel busy, few enough that little of it is masked away.
_BLOCK_ROWS: Final = 512
# Up to so many new tokens reading the keys costs more than computing with them.
_FEW: Final = 32


class RequestKV(NamedTuple):
    keys: torch.Tensor  # [tokens, kv heads, head dim]
    values: torch.Tensor  # [tokens, kv heads, head dim]; the model's values may be only the front


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> RequestKV:
    """Collect the KV of one request from the paged pools, as ``dtype``.

    PyTorch's flash kernel wants keys and values of one width, so narrower values are padded. With latent KV
    (MLA) the values are the front of the keys, and one gather serves as both.
    """
    keys = k_cache.index_select(0, slots).to(dtype)
    if v_cache.data_ptr() == k_cache.data_ptr():
        return RequestKV(keys, keys)
    values = v_cache.index_select(0, slots).to(dtype)
    missing = keys.shape[-1] - values.shape[-1]
    return RequestKV(keys, pad(values, (0, missing)) if missing > 0 else values)


def attend(query: torch.Tensor, kv: RequestKV, scale: float | None, output: torch.Tensor) -> None:
    """Causal attention of a request's new tokens, the last ones, over all of its tokens.

    ``query`` is [new tokens, heads, head dim] in the dtype of ``kv``, with a multiple of its heads (GQA);
    ``scale`` multiplies the scores (None: 1 / sqrt(head dim)); ``output`` is [new tokens, heads, value dim].
    """
    new, heads, _ = query.shape
    total, kv_heads, _ = kv.keys.shape
    group = heads // kv_heads
    keys, values = (part.movedim(0, 1).unsqueeze(0) for part in kv)
    if new <= _FEW:
        # The heads that share a KV head become rows of one head: its keys are read once, not ``group`` times.
        grouped = query.view(new, kv_heads, group, -1).permute(1, 2, 0, 3)
        folded = grouped.reshape(1, kv_heads, group * new, -1)
        mask = _causal_mask(new, total).repeat(group, 1) if new > 1 else None
        result = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        unfolded = result.reshape(kv_heads, group, new, -1).permute(2, 0, 1, 3).flatten(1, 2)
        output.copy_(unfolded[..., : output.shape[-1]])
        return
    queries = query.movedim(0, 1).unsqueeze(0)
    # The kernel's own causal mask skips what it hides, but starts at the first key: no use after a prefix.
    whole = new == total
    step = new if whole else _BLOCK_ROWS
    for start in range(0, new, step):
        end = min(start + step, new)
        visible = total - new + end
        result = scaled_dot_product_attention(
            queries[:, :, start:end],
            keys[:, :, :visible],
            values[:, :, :visible],
            attn_mask=None if whole else _causal_mask(end - start, visible),
            is_causal=whole,
            scale=scale,
            enable_gqa=group > 1,
        )
        output[start:end] = result.squeeze(0).movedim(1, 0)[..., : output.shape[-1]]


def _causal_mask(rows: int, visible: int) -> torch.Tensor:
    """Which of ``visible`` tokens each of the last ``rows`` of them attends to."""
    return torch.ones(rows, visible, dtype=torch.bool).tril_(visible - rows)


class SuffixAttnBackend(TorchNativeAttnBackend):
    """SGLang's ``torch_native`` backend with ``attend`` where plain causal self-attention is asked for.

    Sliding windows, cross attention and encoders go to SGLang's own implementation.
    """

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
        if not causal or _is_special(encoder_lens, is_cross_attn, sliding_window_size):
            super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
            return output
        start = 0
        requests = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        for row, total, new in requests:
            end = start + new
            kv = gather_kv(k_cache, v_cache, req_to_token[row, :total], query.dtype)
            attend(query[start:end], kv, scaling, output[start:end])
            start = end
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if _is_special(encoder_lens, is_cross_attn, sliding_window_size):
            super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
            return output
        for i, (row, total) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
            kv = gather_kv(k_cache, v_cache, req_to_token[row, :total], query.dtype)
            attend(query[i : i + 1], kv, scaling, output[i : i + 1])
        return output


def _is_special(encoder_lens: torch.Tensor | None, is_cross_attn: bool, window: int | None) -> bool:
    return encoder_lens is not None or is_cross_attn or (window is not None and window > -1)
