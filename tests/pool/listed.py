"""An index whose keys and columns are lists, as tests are easier to read with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from polarkv_sglang.pool.index import EVICTION_BATCH, MOST_LEASED_ROWS, Index
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.columns import pack_u64, split_keys, unpack_u64

_NS = 1_000_000_000


class Reservation(NamedTuple):
    number: int
    addresses: list[int]
    states: bytes


class Slots(NamedTuple):
    addresses: list[int]
    length: int
    left_s: float


class Lease(NamedTuple):
    number: int
    addresses: list[int]
    lengths: list[int]
    checksums: list[int]
    generations: list[int]


class Description(NamedTuple):
    parents: list[bytes]
    lengths: list[int]


class ListedIndex:
    """See ``Index``; and what streams do with a reservation: ``fill`` and ``give_up``."""

    def __init__(
        self,
        slab: Slab,
        *,
        clock: Callable[[], float],
        directory: SharedMemory | None = None,
        most_leased_rows: int = MOST_LEASED_ROWS,
        eviction_batch: int = EVICTION_BATCH,
        most_granted: int | None = None,
    ) -> None:
        self._clock_ns = lambda: round(clock() * _NS)
        self._index = index = Index(
            slab,
            directory=directory,
            most_leased_rows=most_leased_rows,
            eviction_batch=eviction_batch,
            most_granted=most_granted,
            clock_ns=self._clock_ns,
        )
        self.renew, self.release, self.end_holds = index.renew, index.release, index.end_holds
        self.expire, self.refused, self.statistics = index.expire, index.refused, index.statistics
        self.check_integrity = index.check_integrity
        self.open_ring, self.close_ring = index.open_ring, index.close_ring

    def reserve(
        self, owner: int, keys: Sequence[bytes], parents: Sequence[bytes], length: int
    ) -> Reservation:
        number, addresses, states = self._index.reserve(owner, b"".join(keys), b"".join(parents), length)
        return Reservation(number, _numbers(addresses), states)

    def commit(self, owner: int, number: int, mask: bytes, checksums: Sequence[int]) -> int:
        return self._index.commit(owner, number, mask, pack_u64(checksums))

    def grant(self, owner: int, length: int, slots: int) -> list[int]:
        return _numbers(self._index.grant(owner, length, slots))

    def locate(self, owner: int, keys: Sequence[bytes], lease_s: float) -> Lease:
        number, *columns = self._index.locate(owner, b"".join(keys), lease_s)
        return Lease(number, *map(_numbers, columns))

    def hold(self, owner: int, keys: Sequence[bytes], lease_s: float) -> tuple[int, bytes]:
        return self._index.hold(owner, b"".join(keys), lease_s)

    def use(self, keys: Sequence[bytes]) -> None:
        self._index.use(b"".join(keys))

    def report_corrupt(self, keys: Sequence[bytes], generations: Sequence[int]) -> None:
        self._index.report_corrupt(b"".join(keys), pack_u64(generations))

    def peek(self, keys: Sequence[bytes]) -> bytes:
        return self._index.peek(b"".join(keys))

    def describe(self, keys: Sequence[bytes]) -> Description:
        parents, lengths = self._index.describe(b"".join(keys))
        return Description(split_keys(parents), _numbers(lengths))

    def generations(self, keys: Sequence[bytes]) -> list[int]:
        """Of blocks that are here; these are neither touched nor leased then."""
        number, *columns = self._index.locate(9, b"".join(keys), 1.0, counted=False)
        self._index.release(9, number)
        return _numbers(columns[-1])

    def fill(self, owner: int, number: int) -> Slots | None:
        ffi, node = self._index._ffi, self._index._node
        addresses, length, left_ns = ffi.new("uint64_t[]", 64), ffi.new("uint64_t *"), ffi.new("int64_t *")
        count = node.polar_fill(
            self._index.native, owner, number, self._clock_ns(), addresses, length, left_ns
        )
        return Slots(list(addresses[0:count]), length[0], left_ns[0] / _NS) if count else None

    def give_up(self, owner: int, number: int) -> None:
        self._index._node.polar_give_up(self._index.native, owner, number, self._clock_ns())


def _numbers(column: bytes) -> list[int]:
    return unpack_u64(column).tolist()
