"""The node's end of a connection that carries blocks: bytes between socket and memory, without the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.framing import HEADER_BYTES, MAX_FRAME_BYTES, BadFrame
from polarkv_sglang.transport.library import Library

_FRAME_BYTES: Final = 64 << 10  # of frames at first: the keys of a large batch fit
_BYTES, _WORDS = "uint8_t[]", "uint64_t[]"
_NEVER_NS = -1


class Delivery:
    """Calls that pass bytes through one connected socket, which must not block. For one thread.

    They return once all bytes have passed. They raise TimeoutError past their time, ConnectionError and other
    OSError if the peer is gone; what has passed by then is anybody's guess.
    """

    def __init__(self, library: Library, fd: int) -> None:
        self._library = library
        self._delivery = library.ffi.new("polar_delivery *", {"fd": fd, "timeout_ns": _NEVER_NS})
        self._header = bytearray(HEADER_BYTES)
        self._frame = bytearray(_FRAME_BYTES)

    def frame(self) -> memoryview:
        """The payload of the next frame, which is waited for; valid until the next call.

        Raises BadFrame if it is over MAX_FRAME_BYTES.
        """
        self.receive(self._header, HEADER_BYTES)
        length = int.from_bytes(self._header, "little")
        if length > MAX_FRAME_BYTES:
            raise BadFrame(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
        if length > len(self._frame):
            self._frame = bytearray(length)
        self.receive(self._frame, length)
        return memoryview(self._frame)[:length]

    def send(
        self,
        head: bytearray,
        addresses: Sequence[int] = (),
        parts: bytes = b"",
        timeout_s: float | None = None,
    ) -> None:
        """Send ``head``, then the parts of each block: u64 of where in a block one begins, and its bytes."""
        delivery, from_buffer = self._delivery, self._library.ffi.from_buffer
        head_bytes = from_buffer(_BYTES, head)
        delivery.head, delivery.head_bytes = head_bytes, len(head)
        self._run(self._library.batch.polar_send, addresses, parts, timeout_s)

    def receive(
        self,
        tail: bytearray,
        tail_bytes: int,
        addresses: Sequence[int] = (),
        parts: bytes = b"",
        timeout_s: float | None = None,
    ) -> None:
        """Receive the parts of each block, and then the first ``tail_bytes`` of ``tail``.

        What comes for a block at address 0 is dropped.
        """
        delivery, from_buffer = self._delivery, self._library.ffi.from_buffer
        tail_start = from_buffer(_BYTES, tail)
        delivery.tail, delivery.tail_bytes = tail_start, tail_bytes
        self._run(self._library.batch.polar_receive, addresses, parts, timeout_s)

    def _run(
        self, call: Callable[[object], int], addresses: Sequence[int], parts: bytes, timeout_s: float | None
    ) -> None:
        delivery, from_buffer = self._delivery, self._library.ffi.from_buffer
        blocks, pairs = from_buffer(_WORDS, pack_u64(addresses)), from_buffer(_WORDS, parts)
        delivery.blocks, delivery.block_count = blocks, len(addresses)
        delivery.parts, delivery.part_count = pairs, len(parts) // 16
        delivery.timeout_ns = _NEVER_NS if timeout_s is None else max(0, int(timeout_s * 1e9))
        error = call(delivery)
        if error:
            raise OSError(error, os.strerror(error))
