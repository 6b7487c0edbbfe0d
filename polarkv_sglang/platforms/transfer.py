"""HiCache's copies between the KV pool (L1) and the host pool (L2) where both are plain host memory.

Drop-in for the functions of the same names in ``sgl_kernel.kvcacheio``, which exist for GPUs only. L1 is one
tensor [tokens, heads, dim] per layer; L2 is one tensor [pages, layers, tokens of a page, heads, dim] (page
first) or, like L1, one tensor per layer (layer first). Indices are token slots; on the host's side they come
as whole pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy token slots between pools that are both layer first."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target.index_copy_(0, dst_indices, source.index_select(0, src_indices))


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Load one layer of whole pages from page-first host tensors (K, V) into that layer of L1."""
    pages = src_indices[::page_size] // page_size
    for host, device in zip(src_ptrs, dst_ptrs, strict=True):
        loaded = host.select(1, layer_id).index_select(0, pages)
        device.index_copy_(0, dst_indices, loaded.flatten(0, 1))


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Back up all layers of whole pages into page-first host tensors.

    ``src_ptrs`` holds the layers for the first of ``dst_ptrs``, then those for the second: all K, then all V.
    """
    pages = dst_indices[::page_size] // page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, device in enumerate(src_ptrs):
        target, layer = divmod(i, layers)
        backup = device.index_select(0, src_indices).view(-1, page_size, *device.shape[1:])
        dst_ptrs[target].select(1, layer).index_copy_(0, pages, backup)
