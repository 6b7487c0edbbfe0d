"""HiCache's copies between the KV pool (L1) and the host pool (L2) where both are plain host memory.

Drop-in for the functions of the same names in ``sgl_kernel.kvcacheio``, which exist for GPUs only. L1 is one
tensor [tokens, heads, dim] per layer; L2 is one tensor [pages, layers, tokens of a page, heads, dim] (page
first) or, like L1, one tensor per layer (layer first). Indices are token slots; on the host's side they come
as whole pages.

Rows are copied by numpy: torch's indexed copies split every small one over all threads, which on a busy
machine takes twenty times as long. Pages that follow each other on both sides, as most do, go in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy token slots between pools that are both layer first."""
    source_slots, target_slots = src_indices.numpy(), dst_indices.numpy()
    for source, target in zip(src_layers, dst_layers, strict=True):
        _bytes(target)[target_slots] = _bytes(source)[source_slots]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Load one layer of whole pages from page-first host tensors (K, V) into that layer of L1."""
    runs = _runs(_pages(src_indices, page_size), _pages(dst_indices, page_size))
    for host, device in zip(src_ptrs, dst_ptrs, strict=True):
        source, target = _bytes(host), _by_page(device, page_size)
        for host_page, device_page, count in runs:
            target[device_page : device_page + count] = source[host_page : host_page + count, layer_id]


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
    runs = _runs(_pages(src_indices, page_size), _pages(dst_indices, page_size))
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, device in enumerate(src_ptrs):
        host, layer = divmod(i, layers)
        source, target = _by_page(device, page_size), _bytes(dst_ptrs[host])
        for device_page, host_page, count in runs:
            target[host_page : host_page + count, layer] = source[device_page : device_page + count]


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The tensor as bytes, whatever its dtype: the last dimension grows by the item size."""
    view: npt.NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return view


def _by_page(device: torch.Tensor, page_size: int) -> npt.NDArray[np.uint8]:
    """A layer of L1 as [pages, tokens of a page, ...]; its slots are a whole number of pages."""
    view = _bytes(device)
    return view.reshape(-1, page_size, *view.shape[1:])


def _pages(slots: torch.Tensor, page_size: int) -> npt.NDArray[np.int64]:
    """Page numbers of token slots that are whole pages."""
    pages: npt.NDArray[np.int64] = slots.numpy()[::page_size] // page_size
    return pages


def _runs(source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(source page, target page, count) of the runs in which both sides are consecutive."""
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    counts = np.diff(np.append(starts, len(source)))
    return list(zip(source[starts].tolist(), target[starts].tolist(), counts.tolist(), strict=True))
