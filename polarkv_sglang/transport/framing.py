"""Frames of the control plane: a u32 little-endian length, then one MessagePack message."""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from polarkv_sglang.transport.messages import Fill, FromClient, FromNode, Message, Pulled, Store

HEADER_BYTES = 4
MAX_HANDSHAKE_FRAME_BYTES = 64 << 10  # before the peer has proved anything
MAX_FRAME_BYTES = 4 << 20

_PAGE_BYTES = 4096
_PADDING = bytes(64)

_encoder = msgspec.msgpack.Encoder()
# One decoder per direction, so that a message sent the wrong way is garbage.
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_node: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)


class BadFrame(Exception):
    """The peer sent what the protocol does not allow; its connection must be closed."""


class FrameReader:
    """Cuts a byte stream into frames; keeps what is incomplete until more bytes come."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> None:
        self._buffer += data

    def __len__(self) -> int:
        """How many bytes are buffered."""
        return len(self._buffer)

    def head(self) -> bytes:
        """The first bytes of what is buffered, HEADER_BYTES at most."""
        return bytes(self._buffer[:HEADER_BYTES])

    def next_frame(self) -> bytes | None:
        """The payload of the next whole frame, None while it is incomplete; BadFrame if it is too long."""
        if len(self._buffer) < HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[:HEADER_BYTES], "little")
        if length > self.max_frame_bytes:
            raise BadFrame(f"a frame of {length} bytes is over the limit of {self.max_frame_bytes}")
        end = HEADER_BYTES + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return frame


def encode_frame(message: Message) -> bytearray:
    """A message as header and payload."""
    payload = _encoder.encode(message)
    frame = bytearray(len(payload).to_bytes(HEADER_BYTES, "little"))
    frame += payload
    return frame


def encode_before(message: Pulled | Store | Fill, address: int, between: int = 0) -> bytearray:
    """A message as header and payload, before bytes at ``address`` that go out with it.

    An empty socket copies what it is given to the start of a page, and on from there. AMD's processors copy
    at half their speed to a place that lies in its page where the source lies in its own, or less than 32
    bytes further on: then some padding is put between, twice as much for good measure. ``between``: bytes
    that go out before those at ``address`` as well.
    """
    frame = encode_frame(message)
    if (len(frame) + between - address) % _PAGE_BYTES < len(_PADDING):
        frame = encode_frame(msgspec.structs.replace(message, padding=_PADDING))
    return frame


def decode_from_client(frame: bytes | memoryview) -> FromClient:
    """What a client sent; BadFrame if it is no valid message of a client."""
    try:
        return _from_client.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"not a message of a client: {error}") from error


def decode_from_node(frame: bytes | memoryview) -> FromNode:
    """What a memory node sent; BadFrame if it is no valid message of a node."""
    try:
        return _from_node.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"not a message of a memory node: {error}") from error


def prove(token: str, client_nonce: bytes, node_nonce: bytes) -> bytes:
    """The mac of a ``Proof``; fresh nonces from both sides make it useless to whoever recorded it."""
    return hmac.digest(token.encode(), b"polarkv client\0" + client_nonce + node_nonce, hashlib.sha256)
