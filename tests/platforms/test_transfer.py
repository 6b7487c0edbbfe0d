"""L1 -> L2 -> L1 on pools in the layouts that SGLang gives them."""

from __future__ import annotations

import pytest
import torch

from polarkv_sglang.platforms.transfer import (
    transfer_kv_all_layer_direct_lf_pf,
    transfer_kv_direct,
    transfer_kv_per_layer_direct_pf_lf,
)

LAYERS, L1_PAGES, L2_PAGES = 3, 12, 20


def _slots(pages: list[int], page_size: int) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)).flatten()


def _l1(page_size: int, row: tuple[int, ...], fill: bool) -> list[torch.Tensor]:
    make = torch.randn if fill else torch.zeros
    return [make(L1_PAGES * page_size, *row).bfloat16() for _ in range(LAYERS)]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("row", [(2, 32), (1, 80)], ids=["mha", "mla"])
@pytest.mark.parametrize("parts", [1, 2], ids=["latent", "k and v"])
def test_pages_come_back_from_a_page_first_host_pool(
    page_size: int, row: tuple[int, ...], parts: int
) -> None:
    torch.manual_seed(0)
    host = [torch.zeros(L2_PAGES, LAYERS, page_size, *row).bfloat16() for _ in range(parts)]
    l1 = [_l1(page_size, row, fill=True) for _ in range(parts)]
    source, kept, target = [5, 2, 11], [17, 0, 3], [1, 9, 4]
    transfer_kv_all_layer_direct_lf_pf(
        [layer for part in l1 for layer in part],
        host,
        _slots(source, page_size),
        _slots(kept, page_size),
        page_size,
    )
    for part in range(parts):
        for layer in range(LAYERS):
            expected = l1[part][layer][_slots(source, page_size)]
            assert torch.equal(host[part][kept, layer].flatten(0, 1), expected)
        untouched = sorted(set(range(L2_PAGES)) - set(kept))
        assert not host[part][untouched].any()

    back = [_l1(page_size, row, fill=False) for _ in range(parts)]
    for layer in range(LAYERS):
        transfer_kv_per_layer_direct_pf_lf(
            host,
            [part[layer] for part in back],
            _slots(kept, page_size),
            _slots(target, page_size),
            layer,
            page_size,
        )
    for part in range(parts):
        for layer in range(LAYERS):
            assert torch.equal(
                back[part][layer][_slots(target, page_size)], l1[part][layer][_slots(source, page_size)]
            )
            others = sorted(set(range(L1_PAGES)) - set(target))
            assert not back[part][layer][_slots(others, page_size)].any()


def test_slots_come_back_from_a_layer_first_host_pool() -> None:
    torch.manual_seed(0)
    l1, host, back = _l1(16, (2, 32), True), _l1(16, (2, 32), False), _l1(16, (2, 32), False)
    source, kept, target = _slots([5, 2], 16), _slots([0, 11], 16), _slots([7, 1], 16)
    transfer_kv_direct(l1, host, source, kept, 16)
    transfer_kv_direct(host, back, kept, target, 16)
    for before, after in zip(l1, back, strict=True):
        assert torch.equal(after[target], before[source])
        assert after.count_nonzero() == after[target].count_nonzero()
