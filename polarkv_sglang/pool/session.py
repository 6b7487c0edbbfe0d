"""One client's connection to a memory node: handshake, then requests, answered where they are read."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from polarkv_sglang.pool.index import Index
from polarkv_sglang.transport.framing import (
    MAX_FRAME_BYTES,
    MAX_HANDSHAKE_FRAME_BYTES,
    BadFrame,
    FrameReader,
    decode_from_client,
    encode_frame,
    prove,
)
from polarkv_sglang.transport.messages import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Commit,
    Committed,
    FromClient,
    Hello,
    Locate,
    Located,
    Message,
    NodeStatistics,
    Peek,
    Peeked,
    Proof,
    Refused,
    Release,
    ReportCorrupt,
    Reserve,
    Reserved,
    Role,
    Statistics,
    Welcome,
    pack_u64,
    split_keys,
    unpack_u64,
)

HANDSHAKE_S = 10.0  # a connection that has not authenticated by then is closed
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Service:
    """What all sessions of a node share; used on the event loop's thread only."""

    index: Index
    token: str | None
    welcome: Welcome  # as ranks get it
    statistics: Callable[[int], NodeStatistics]  # by request_id
    lifelines_changed: Callable[[int], None]  # called with how many are left
    sessions: set[Session] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)  # handshakes, by reason
    bad_frames: int = 0
    owners: Iterator[int] = field(default_factory=itertools.count)

    def report_lifelines(self) -> None:
        self.lifelines_changed(sum(session.role == "lifeline" for session in self.sessions))


class Session(asyncio.Protocol):
    """A connection. What a client does wrong ends its own connection and nothing else."""

    _transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self.role: Role | None = None  # set once authenticated
        self._service = service
        self._frames = FrameReader(MAX_HANDSHAKE_FRAME_BYTES)
        self._hello: Hello | None = None
        self._nonce = os.urandom(NONCE_BYTES)
        self._owner = next(service.owners)  # of leases and reservations

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer: socket.socket = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
        self._service.sessions.add(self)
        self._expiry = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._expiry.cancel()
        self._service.sessions.discard(self)
        if self.role == "lifeline":
            self._service.report_lifelines()

    def pause_writing(self) -> None:
        # Who does not read the replies gets to send no more requests.
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        try:
            while not self._transport.is_closing() and (frame := self._frames.next_frame()) is not None:
                message = decode_from_client(frame)
                if self.role is None:
                    self._authenticate(message)
                else:
                    self._answer(message)
        except BadFrame as error:
            self._service.bad_frames += 1
            _logger.debug("closed the connection of %s: %s", self._name(), error)
            self.abort()

    def abort(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        self._transport.abort()

    def _name(self) -> str:
        peer = self._transport.get_extra_info("peername")
        return f"{self._hello.client if self._hello else 'unknown'} at {peer[0]}:{peer[1]}" if peer else "?"

    def _send(self, message: Message) -> None:
        self._transport.write(encode_frame(message))

    def _authenticate(self, message: FromClient) -> None:
        token = self._service.token
        match message:
            case Hello() if self._hello is None:
                self._hello = message
                if message.protocol_version != PROTOCOL_VERSION:
                    self._refuse(
                        "version",
                        f"it speaks protocol {PROTOCOL_VERSION}, we speak {message.protocol_version}; "
                        "install one PolarKV version everywhere",
                    )
                    return
                self._send(Challenge(PROTOCOL_VERSION, self._nonce, token is not None))
            case Proof() if self._hello is not None:
                if token is not None and not hmac.compare_digest(
                    message.mac, prove(token, self._hello.nonce, self._nonce)
                ):
                    self._refuse("token", "it has another token; set POLARKV_TOKEN to the node's")
                    return
                self._admit(self._hello.role)
            case _:
                raise BadFrame(f"{type(message).__name__} before authentication")

    def _refuse(self, reason: str, text: str) -> None:
        """``text`` is written from the client's side, where it is read."""
        self._service.refused[reason] += 1
        _logger.info("refused %s: %s differs", self._name(), reason)
        self._send(Refused(text))
        self._transport.close()

    def _admit(self, role: Role) -> None:
        self._expiry.cancel()
        self._frames.max_frame_bytes = MAX_FRAME_BYTES
        self.role = role
        welcome = self._service.welcome
        if role != "rank":
            welcome = Welcome(
                welcome.node_id, b"", b"", welcome.base_address, welcome.capacity_bytes, welcome.segment_bytes
            )
        self._send(welcome)
        if role == "lifeline":
            self._service.report_lifelines()

    def _answer(self, request: FromClient) -> None:
        if self.role != "rank" and not isinstance(request, Peek | Statistics):
            raise BadFrame(f"a {self.role} may not send {type(request).__name__}")
        index, owner = self._service.index, self._owner
        match request:
            case Locate():
                lease = index.locate(owner, split_keys(request.keys), request.lease_s)
                columns = (lease.addresses, lease.lengths, lease.checksums, lease.generations)
                self._send(Located(request.request_id, lease.number, *map(pack_u64, columns)))
            case Release():
                index.release(owner, request.lease)
            case Peek():
                self._send(Peeked(request.request_id, index.peek(split_keys(request.keys))))
            case Reserve():
                keys, parents = split_keys(request.keys), split_keys(request.parents)
                reservation = index.reserve(owner, keys, parents, request.length)
                addresses = pack_u64(reservation.addresses)
                self._send(Reserved(request.request_id, reservation.number, addresses, reservation.states))
            case Commit():
                checksums = unpack_u64(request.checksum_blob).tolist()
                try:
                    count = index.commit(owner, request.reservation, request.mask, checksums)
                except ValueError as error:
                    raise BadFrame(str(error)) from error
                self._send(Committed(request.request_id, count))
            case ReportCorrupt():
                index.report_corrupt(split_keys(request.keys), unpack_u64(request.generation_blob).tolist())
            case Statistics():
                self._send(self._service.statistics(request.request_id))
            case _:
                raise BadFrame(f"{type(request).__name__} after authentication")
