"""Blocks that pass through a client's connection, from and to the slab without a copy in between.

Everything here runs on the event loop's thread, between two looks at the index: bytes are received into a
slot only while its reservation stands, so a writer that is late harms nobody.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Sequence

from polarkv_sglang.pool.index import Index
from polarkv_sglang.transport.columns import pack_u64, split_keys, unpack_u64
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import MAX_LEASE_S, Message, Pull, Pulled

_LONGEST_READ = 1 << 20  # bytes that one connection receives before the others get a turn
_SENT_CHECK_FIRST_S = 0.001
_SENT_CHECK_S = 0.02


class SlabView:
    """The slab's bytes, by address; must not be used once the memory is closed."""

    def __init__(self, base_address: int, capacity_bytes: int) -> None:
        self._base_address = base_address
        self._bytes = memoryview((ctypes.c_uint8 * capacity_bytes).from_address(base_address)).cast("B")

    def at(self, address: int, length: int) -> memoryview:
        """``length`` bytes at ``address``."""
        start = address - self._base_address
        return self._bytes[start : start + length]

    def blocks(self, addresses: Sequence[int], length: int) -> list[memoryview]:
        """Blocks of one length, in order; those that follow each other in one view."""
        return [self.at(address, size) for address, size in runs(addresses, length)]


class Upload:
    """Blocks of one request on their way from a client, and behind them what it says of them."""

    def __init__(
        self,
        index: Index,
        slab: SlabView,
        scratch: memoryview,
        owner: int,
        reservation: int,
        addresses: Sequence[int],
        length: int,
        reply: Callable[[int], Message],
    ) -> None:
        """``addresses``: of slots; 0 where the bytes are for nobody. ``reply``: from how many are visible."""
        self._index, self._slab, self._scratch = index, slab, scratch
        self._owner, self._reservation = owner, reservation
        self._reserved = [address != 0 for address in addresses]
        self._has_slots = any(self._reserved)
        self._reply = reply
        self._runs = runs(addresses, length)
        self._runs.reverse()
        self._words = memoryview(bytearray(9 * len(addresses)))
        self._words_read = 0
        self.ended = not addresses

    def buffer(self) -> memoryview | None:
        """Where the next bytes go, never empty; None once the reservation is over."""
        if self._has_slots and not self._index.is_reserved(self._owner, self._reservation):
            return None
        if not self._runs:
            return self._words[self._words_read :]
        address, length = self._runs[-1]
        if not address:
            return self._scratch[:length]
        return self._slab.at(address, min(length, _LONGEST_READ))

    def received(self, count: int) -> None:
        """So many bytes are in the last ``buffer``."""
        if self._runs:
            address, length = self._runs.pop()
            if count < length:
                self._runs.append((address and address + count, length - count))
            return
        self._words_read += count
        self.ended = self._words_read == len(self._words)

    def commit(self) -> Message:
        """Make visible what the client says, once all has come; the reply."""
        blocks = len(self._reserved)
        mask = bytes(self._words[8 * blocks :])
        checksums = unpack_u64(bytes(self._words[: 8 * blocks])).tolist()
        ours = [place for place, reserved in enumerate(self._reserved) if reserved]
        count = 0
        if self._has_slots:
            count = self._index.commit(
                self._owner,
                self._reservation,
                bytes(mask[place] for place in ours),
                [checksums[place] for place in ours],
            )
        return self._reply(count)

    def abandon(self) -> None:
        """The client is gone: nothing writes to the slots any more."""
        if self._has_slots and self._index.is_reserved(self._owner, self._reservation):
            count = sum(self._reserved)
            self._index.commit(self._owner, self._reservation, bytes(count), [0] * count)


def runs(addresses: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(address, bytes) of blocks of one length, those that follow each other as one; 0 is no address."""
    found: list[tuple[int, int]] = []
    for address in addresses:
        if found:
            start, size = found[-1]
            if (start + size == address) if address and start else address == start:
                found[-1] = (start, size + length)
                continue
        found.append((address, length))
    return found


def send_blocks(
    index: Index,
    slab: SlabView,
    owner: int,
    request: Pull,
    parts: Sequence[tuple[int, int]],
    transport: asyncio.Transport,
) -> int:
    """Answer a pull; how many blocks that sends ``parts`` of: where each begins in a block, and its bytes.

    They are leased until the socket has taken them; a client that lets the lease end before is cut off, since
    what it reads after that may not be what was asked for.
    """
    lease = index.locate(owner, split_keys(request.keys), MAX_LEASE_S, counted=parts[0][0] == 0)
    count = next(
        (at for at, length in enumerate(lease.lengths) if length != request.length), len(lease.lengths)
    )
    checksums, generations = pack_u64(lease.checksums[:count]), pack_u64(lease.generations[:count])
    head = encode_frame(Pulled(request.request_id, checksums, generations))
    head += (count * sum(size for _, size in parts)).to_bytes(8, "little")
    addresses = lease.addresses[:count]
    if request.part_blob:
        views = [slab.at(address + start, size) for address in addresses for start, size in parts]
    else:
        views = slab.blocks(addresses, request.length)
    transport.writelines([head, *views])
    loop = asyncio.get_running_loop()

    def release_once_sent() -> None:
        if transport.is_closing() or not transport.get_write_buffer_size():
            index.release(owner, lease.number)
        elif index.is_leased(owner, lease.number):
            loop.call_later(_SENT_CHECK_S, release_once_sent)
        else:
            transport.abort()

    if lease.number:
        # Not at once: to uvloop the buffer is empty until it has tried to write.
        loop.call_later(_SENT_CHECK_FIRST_S, release_once_sent)
    return count
