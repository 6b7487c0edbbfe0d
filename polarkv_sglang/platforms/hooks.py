from __future__ import annotations

import torch


def install() -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.mem_cache.pool_host import base, mha, mla
    from sglang.srt.models.deepseek_common import attention_backend_handler as H
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    H.AttentionBackendRegistry.register("torch_native", lambda attn, fb: AttnForwardMethod.MLA)

    def make(runner):
        from polarkv_sglang.platforms.attention import SuffixAttnBackend

        return SuffixAttnBackend(runner)

    attention_registry.ATTENTION_BACKENDS["torch_native"] = make
    i0 = base.HostKVCache.__init__
    if getattr(i0, "_polar", False):
        return

    def init(self, *a, **k):
        k["pin_memory"] = False
        i0(self, *a, **k)

    init._polar = True
    base.HostKVCache.__init__ = init
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 2 << 30

    def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
        for a, b in zip(src_layers, dst_layers):
            b[dst_indices] = a[src_indices]

    def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
        sp = src_indices[::page_size].cpu() // page_size
        d = dst_indices.cpu()
        for a, b in zip(src_ptrs, dst_ptrs):
            b[d] = a[sp, layer_id].reshape(-1, *a.shape[3:])

    def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
        n = len(src_ptrs) // len(dst_ptrs)
        s = src_indices.cpu()
        dp = dst_indices[::page_size].cpu() // page_size
        for j, dst in enumerate(dst_ptrs):
            for l in range(n):
                x = src_ptrs[j * n + l][s]
                dst[dp, l] = x.reshape(len(dp), page_size, *x.shape[1:])

    for m in (mha, mla):
        m.transfer_kv_direct = transfer_kv_direct
        m.transfer_kv_per_layer_direct_pf_lf = transfer_kv_per_layer_direct_pf_lf
        m.transfer_kv_all_layer_direct_lf_pf = transfer_kv_all_layer_direct_lf_pf
