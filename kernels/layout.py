"""SGLang's paged KV pool as bytes, and the layout of a block that is packed from it.

A block is one page of one rank, all layers: ``[K|V][layer][token][head][dim]``, contiguous (MLA, whose pool
has one part: ``[layer][token][dim]``). Everything here counts bytes, so any dtype works, fp8 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

# The widest access of a GPU thread.
_WIDEST_ACCESS_BYTES: Final = 16


class LayerRange(NamedTuple):
    start: int
    end: int  # exclusive

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class PagedPool:
    """The tensors of a rank's KV pool, one per layer for K and one for V (MLA: one per layer).

    A page is ``page_size`` consecutive slots. The tensors are borrowed: they must outlive this object and
    keep their addresses.
    """

    parts: tuple[tuple[torch.Tensor, ...], ...]  # per part and layer: uint8 [slots, bytes of a token]
    page_size: int  # tokens
    pointers: torch.Tensor  # int64 [parts, layers] on the pool's device: address of each tensor
    alignment: int  # bytes: the widest access (at most 16) to which every token of the pool is aligned

    @classmethod
    def of(cls, parts: Sequence[Sequence[torch.Tensor]], page_size: int) -> PagedPool:
        """The pool of ``[k_buffer, v_buffer]`` or, for MLA, of ``[kv_buffer]``; each a tensor per layer.

        Tensors are [slots, heads, dim]; all have as many slots, those of one part are alike in dtype, shape
        and strides, and the bytes of one slot are contiguous. Raises ValueError otherwise.
        """
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be at least 1")
        if len(parts) not in (1, 2) or not parts[0] or any(len(part) != len(parts[0]) for part in parts):
            counts = [len(part) for part in parts]
            raise ValueError(
                f"tensors per part are {counts}; K and V, or one part, of as many layers are needed"
            )
        views = tuple(tuple(_as_bytes(tensor) for tensor in part) for part in parts)
        first = views[0][0]
        for part in views:
            for tensor in part:
                if tensor.device != first.device or len(tensor) != len(first):
                    raise ValueError(
                        f"a layer has {len(tensor)} slots on {tensor.device}, "
                        f"the first one {len(first)} on {first.device}"
                    )
                if (tensor.shape, tensor.stride()) != (part[0].shape, part[0].stride()):
                    raise ValueError(
                        f"a layer is {list(tensor.shape)} bytes with strides {list(tensor.stride())}, "
                        f"the first of its part {list(part[0].shape)} with {list(part[0].stride())}"
                    )
        addresses = [[tensor.data_ptr() for tensor in part] for part in views]
        widths = [width for part in views for width in (part[0].shape[1], part[0].stride(0))]
        return cls(
            parts=views,
            page_size=page_size,
            pointers=torch.tensor(addresses, dtype=torch.int64, device=first.device),
            alignment=alignment(*widths, *(address for part in addresses for address in part)),
        )

    @property
    def device(self) -> torch.device:
        return self.pointers.device

    @property
    def slots(self) -> int:
        return len(self.parts[0][0])

    @property
    def layers(self) -> int:
        return len(self.parts[0])

    @property
    def block_bytes(self) -> int:
        return sum(self.layers * self.layer_bytes(part) for part in range(len(self.parts)))

    def token_bytes(self, part: int) -> int:
        """Bytes of one token in one layer of K (0) or V (1)."""
        return self.parts[part][0].shape[1]

    def slot_stride(self, part: int) -> int:
        """Bytes from one slot to the next; more than ``token_bytes`` where the pool has gaps."""
        return self.parts[part][0].stride(0)

    def layer_bytes(self, part: int) -> int:
        """Bytes of one page in one layer of K (0) or V (1)."""
        return self.page_size * self.token_bytes(part)

    def part_start(self, part: int) -> int:
        """Where K (0) or V (1) begins in a block."""
        return sum(self.layers * self.layer_bytes(before) for before in range(part))

    def layer_range(self, start: int, end: int) -> PagedPool:
        """The pool of layers [start, end) alone: its blocks hold these layers and nothing else.

        Copies to the device: make it once, not per call.
        """
        layers = self.checked_range((start, end))
        return PagedPool.of([part[layers.start : layers.end] for part in self.parts], self.page_size)

    def checked_range(self, layers: tuple[int, int] | None) -> LayerRange:
        """``layers`` as a range of this pool's layers, None being all; ValueError if it is not inside."""
        span = LayerRange(*layers) if layers is not None else LayerRange(0, self.layers)
        if not 0 <= span.start <= span.end <= self.layers:
            raise ValueError(
                f"layers [{span.start}, {span.end}) are not within the pool's [0, {self.layers})"
            )
        return span


def alignment(*numbers: int) -> int:
    """The largest power of two, at most 16, that divides all of ``numbers`` (addresses, strides, sizes)."""
    bits = _WIDEST_ACCESS_BYTES
    for number in numbers:
        bits |= number
    return bits & -bits


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[slots, heads, dim] of any dtype as uint8 [slots, bytes of a token], without a copy."""
    if tensor.dim() < 2 or tensor.stride(-1) != 1 or not tensor[:1].is_contiguous():
        raise ValueError(
            f"a layer has shape {list(tensor.shape)} and strides {list(tensor.stride())}; "
            "[slots, heads, dim] with the bytes of each slot contiguous is needed"
        )
    flat = tensor.as_strided((len(tensor), tensor.shape[1:].numel()), (tensor.stride(0), 1))
    return flat.view(torch.uint8)
