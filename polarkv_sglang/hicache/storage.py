"""PolarStorage: HiCache's storage tier on the memory pool, L2 <-> L3."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from polarkv_sglang.hicache.naming import JOINT_LAYOUT, SPLIT_LAYOUT, BlockNames, RankPlace
from polarkv_sglang.pool.blocks import Chain, Pieces
from polarkv_sglang.runtime import current_runtime

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.pool_host import HostKVCache

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PolarStorage(HiCacheStorage):
    """Pages of HiCache's host pool as blocks of the memory pool.

    RMA runs straight from and to the host pool's registered memory. Called by HiCache's storage
    threads: lookups, reads and writes on one thread each, which use separate lanes of the client.
    Every call returns within the configured deadline; what goes wrong is a miss.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, object]) -> None:
        """As HiCache's ``dynamic`` backend calls it; ``kwargs``, its extra config, is not used."""
        self._ranks = storage_config
        self._runtime = current_runtime()
        self._client = self._runtime.client
        self._names: BlockNames | None = None
        self._unsupported: set[str] = set()

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        """Register the host pool's buffers; TransportError if UCX refuses, which fails the attach."""
        super().register_mem_pool_host(mem_pool_host)
        for buffer in _buffers(mem_pool_host):
            self._client.register(buffer.data_ptr(), buffer.numel() * buffer.element_size())

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName) -> None:
        """Note pools beside plain KV (sliding window, Mamba, index keys, draft): they are not shared yet."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            self._unsupported.add(str(host_pool_name))
            logger.warning(
                "PolarKV: this model keeps %s state beside its KV, which the pool does not hold yet; "
                "KV of this engine stays local",
                host_pool_name,
            )

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages at the head of ``keys`` (page hashes, hexadecimal) the pool holds."""

        def look() -> int:
            wanted = self._chain(keys, extra_info)
            return 0 if wanted is None else self._client.peek(wanted)

        return _or_miss(0, look)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Read pages into the host pool at ``host_indices`` (page_size token slots a page)."""

        def read() -> list[bool]:
            wanted = self._chain(keys, extra_info)
            return miss if wanted is None else self._client.get(wanted, self._pieces(host_indices)).tolist()

        miss = [False] * len(keys)
        return _or_miss(miss, read)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Write pages of the host pool at ``host_indices``; those that the pool has already are skipped."""

        def write() -> list[bool]:
            offered = self._chain(keys, extra_info)
            if offered is None:
                return miss
            stored: list[bool] = self._client.put(offered, self._pieces(host_indices)).tolist()
            if self._runtime.on_stored is not None:
                self._runtime.on_stored([key for key, is_there in zip(keys, stored) if is_there])
            return stored

        miss = [False] * len(keys)
        return _or_miss(miss, write)

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """A miss: pages count only together with state of other pools, which is not held."""
        return PoolTransferResult.empty()

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """A miss, see ``batch_exists_v2``."""
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Nothing is written, see ``batch_exists_v2``."""
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def exists(self, key: str) -> bool:
        """Whether the pool holds the first page of a prefix; other pages are found by ``batch_exists``."""
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: object = None, target_sizes: object = None) -> None:
        """Not part of the zero-copy interface that we offer; a miss."""

    def batch_get(
        self, keys: list[str], target_locations: object = None, target_sizes: object = None
    ) -> list[None]:
        """Not part of the zero-copy interface that we offer; a miss."""
        return [None] * len(keys)

    def set(
        self, key: str, value: object = None, target_location: object = None, target_sizes: object = None
    ) -> bool:
        """Not part of the zero-copy interface that we offer; nothing is written."""
        return False

    def batch_set(
        self,
        keys: list[str],
        values: object = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Not part of the zero-copy interface that we offer; nothing is written."""
        return False

    def _chain(self, page_hashes: list[str], extra_info: HiCacheStorageExtraInfo | None) -> Chain | None:
        """Blocks of the pages, with their place in the prefix; None while nothing may be shared."""
        names = self.names()
        digest = names.digest()
        if digest is None or self._unsupported:
            return None
        return names.chain(digest, (extra_info and extra_info.prefix_keys) or [], page_hashes)

    def names(self) -> BlockNames:
        """How blocks are named; once a host pool is registered."""
        if self._names is None:
            pool, ranks = self.mem_pool_host, self._ranks
            self._names = BlockNames(
                self._runtime,
                RankPlace(
                    # Rank-replicated KV has one copy in the pool, written by the first rank.
                    replicated=ranks.is_mla_model,
                    tp_rank=ranks.tp_rank,
                    tp_size=ranks.tp_size,
                    pp_rank=ranks.pp_rank,
                    pp_size=ranks.pp_size,
                    cp_rank=ranks.attn_cp_rank,
                    cp_size=ranks.attn_cp_size,
                ),
                page_tokens=pool.page_size,
                block_bytes=self._block_bytes(),
                layout=_layout(pool),
            )
        return self._names

    def _block_bytes(self) -> int:
        import torch

        return self._pieces(torch.arange(self.mem_pool_host.page_size)).block_bytes

    def _pieces(self, host_indices: torch.Tensor) -> Pieces:
        """Where the pages at ``host_indices`` lie; a page's pieces are consecutive and of one length."""
        addresses, lengths = self.mem_pool_host.get_page_buffer_meta(host_indices)
        piece_bytes = {lengths} if isinstance(lengths, int) else set(lengths)
        if len(piece_bytes) != 1:
            raise ValueError(f"a page in pieces of different lengths {sorted(piece_bytes)} is not supported")
        pages = len(host_indices) // self.mem_pool_host.page_size
        return Pieces(np.array(addresses, np.uint64).reshape(pages, -1), piece_bytes.pop())


def _or_miss(miss: T, call: Callable[[], T]) -> T:
    """What ``call`` returns; ``miss`` instead of raising into SGLang's storage threads."""
    try:
        return call()
    except Exception:  # the pool can never hurt the engine
        logger.exception("PolarKV: an operation on the pool failed and counts as a miss")
        return miss


def _buffers(pool: HostKVCache) -> list[torch.Tensor]:
    """The host pool's tensors, one for each separately allocated buffer."""
    import torch

    found = [getattr(pool, name, None) for name in ("kv_buffer", "k_buffer", "v_buffer")]
    tensors = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
    if not tensors:
        raise ValueError(f"host pool {type(pool).__name__} has no buffer that could be registered")
    return tensors


def _layout(pool: HostKVCache) -> str:
    """Order of the bytes in a page of the host pool; direct mode has the same names for the same orders."""
    kind = type(pool).__name__
    known = {"MHATokenToKVPoolHost": SPLIT_LAYOUT, "MLATokenToKVPoolHost": JOINT_LAYOUT}
    if pool.layout == "page_first_direct" and kind in known:
        return known[kind]
    return f"{kind}/{pool.layout}"
