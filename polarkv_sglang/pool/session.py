"""One client's connection to a memory node: handshake, then requests, answered where they are read."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import msgspec

from polarkv_sglang.pool.answers import answer
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.pool.push import Pusher, Pushers
from polarkv_sglang.pool.stream import Stream, Streams
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
    Fetch,
    Fetched,
    FromClient,
    Hello,
    Message,
    NodeStatistics,
    Peek,
    Proof,
    Refused,
    Replicate,
    Role,
    StartStream,
    Statistics,
    Streaming,
    View,
    Welcome,
)
from polarkv_sglang.transport.tls import TlsStream, starts_tls

_SCRATCH_BYTES = 64 << 10  # that are read at a time
HANDSHAKE_S = 10.0  # a connection that has not authenticated by then is closed
MAX_VIEWS_BYTES = 1 << 20  # of what all ranks tell, so that statistics stay below MAX_FRAME_BYTES
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Service:
    """What all sessions of a node share; used on the event loop's thread only, but for ``replicate``."""

    index: Index
    notes: Notes
    pushers: Pushers
    streams: Streams
    token: str | None
    tls: ssl.SSLContext | None  # None: connections are in the clear
    welcome: Welcome  # as ranks get it
    statistics: Callable[[int], NodeStatistics]  # by request_id
    lifelines_changed: Callable[[int], None]  # called with how many are left
    replicate: Callable[[bytes, str], None] | None = None  # keys and target; None: not done here
    sessions: set[Session] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)  # handshakes, by reason
    bad_frames: int = 0
    closing: bool = False  # the node is going: no session may begin that nobody would end
    owners: Iterator[int] = field(default_factory=itertools.count)
    # A read into it is looked at before the next, whoever's it is.
    scratch: memoryview = field(default_factory=lambda: memoryview(bytearray(_SCRATCH_BYTES)))

    def views(self) -> tuple[dict[str, dict[str, str]], int]:
        """The views of connected ranks by their names, and how many are left out for being too much."""
        views: dict[str, dict[str, str]] = {}
        told = {session.name: session.view for session in self.sessions if session.view is not None}
        room = MAX_VIEWS_BYTES
        for name, view in sorted(told.items()):
            room -= len(encode_frame(view))
            if room >= 0:
                views[name] = view.out
        return views, len(told) - len(views)

    def report_lifelines(self) -> None:
        self.lifelines_changed(sum(session.role == "lifeline" for session in self.sessions))


class Session(asyncio.BufferedProtocol):
    """A connection. What a client does wrong ends its own connection and nothing else."""

    _transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self.role: Role | None = None  # set once authenticated
        self.view: View | None = None  # the last that the rank told
        self._service = service
        self._tls = TlsStream(service.tls) if service.tls is not None else None
        self._frames = FrameReader(MAX_HANDSHAKE_FRAME_BYTES)
        self._refused = False  # has been told so, and is not listened to any more
        self._hello: Hello | None = None
        self._nonce = os.urandom(NONCE_BYTES)
        self._owner = next(service.owners)  # of leases and reservations
        self._pusher: Pusher | None = None  # made by the first Fetch
        self._fetch: asyncio.Task[Fetched] | None = None  # under way: nothing else is answered meanwhile
        self._stream: Stream | None = None  # once it streams, what is received belongs to it
        self._replies_unread = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop has transports of its own, which only behave like one.
        self._transport = cast(asyncio.Transport, transport)
        if self._service.closing:
            self._transport.abort()
        peer: socket.socket = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
        self._service.sessions.add(self)
        self._expiry = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._expiry.cancel()
        self._service.sessions.discard(self)
        if self._pusher is not None:
            self._pusher.close()
        self._service.index.end_holds(self._owner)
        if self.role == "lifeline":
            self._service.report_lifelines()

    def pause_writing(self) -> None:
        # Who does not read the replies gets to send no more requests.
        self._replies_unread = True
        self._read_or_pause()

    def resume_writing(self) -> None:
        self._replies_unread = False
        self._take_frames()
        self._read_or_pause()

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._service.scratch

    def buffer_updated(self, count: int) -> None:
        if self._refused or self._transport.is_closing():
            return
        data = self._service.scratch[:count]
        self._frames.feed(self._decrypt(self._tls, bytes(data)) if self._tls is not None else data)
        self._take_frames()

    def _take_frames(self) -> None:
        try:
            while (
                self._fetch is None
                and self._stream is None
                and not self._replies_unread
                and not self._refused
                and not self._transport.is_closing()
                and (frame := self._frames.next_frame()) is not None
            ):
                message = decode_from_client(frame)
                if self.role is None:
                    self._authenticate(message)
                else:
                    self._answer(message)
        except BadFrame as error:
            if self._tls is None and self._hello is None and starts_tls(self._frames.head()):
                self._refuse("tls", "it does not speak TLS")
            else:
                self._broke_protocol(error)

    def _broke_protocol(self, error: Exception) -> None:
        self._service.bad_frames += 1
        _logger.debug("closed the connection of %s: %s", self.name, error)
        self.abort()

    def _read_or_pause(self) -> None:
        if self._transport.is_closing():
            return
        if self._replies_unread or self._fetch is not None or self._stream is not None:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        if self._stream is not None:  # it has a descriptor of its own
            self._stream.stop()
        self._transport.abort()

    @property
    def name(self) -> str:
        """The client's name for itself, and where it is."""
        peer = self._transport.get_extra_info("peername")
        return f"{self._hello.client if self._hello else 'unknown'} at {peer[0]}:{peer[1]}" if peer else "?"

    def _send(self, message: Message) -> None:
        frame = encode_frame(message)
        if self._tls is not None:
            self._tls.send(frame)
            self._transport.write(self._tls.outgoing())
        else:
            self._transport.write(frame)

    def _decrypt(self, tls: TlsStream, data: bytes) -> bytes:
        try:
            data = tls.receive(data)
            self._transport.write(tls.outgoing())
            return data
        except ssl.SSLError as error:
            if tls.established:
                self._broke_protocol(error)
            elif starts_tls(tls.head):
                self._count_refused("tls", str(error))
                self._transport.write(tls.outgoing())  # the alert
                self._hear_no_more()
            else:
                self._tls = None
                self._refuse("tls", "it speaks TLS only; set POLARKV_TLS_CERT, _KEY and _CA")
            return b""

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
        self._count_refused(reason, text)
        self._send(Refused(text))
        self._hear_no_more()

    def _count_refused(self, reason: str, text: str) -> None:
        self._service.refused[reason] += 1
        _logger.info("refused %s (%s): %s", self.name, reason, text)

    def _hear_no_more(self) -> None:
        # Closing while the client still sends would reset the connection, and take our last words with it:
        # the client closes, or the time for the handshake ends.
        self._refused = True
        self._transport.write_eof()

    def _admit(self, role: Role) -> None:
        self._expiry.cancel()
        self._frames.max_frame_bytes = MAX_FRAME_BYTES
        self.role = role
        welcome = self._service.welcome
        if role != "rank":
            nothing = {"worker_address": b"", "rkey": b"", "shared": None, "directory": None}
            welcome = msgspec.structs.replace(welcome, **nothing)
        self._send(welcome)
        if role == "lifeline":
            self._service.report_lifelines()

    def _answer(self, request: FromClient) -> None:
        if self.role != "rank" and not isinstance(request, Peek | Statistics):
            raise BadFrame(f"a {self.role} may not send {type(request).__name__}")
        service, index, owner = self._service, self._service.index, self._owner
        match request:
            case View():
                self.view = request
            case Statistics():
                self._send(service.statistics(request.request_id))
            case Replicate():
                self._replicate(request)
            case Fetch():
                if self._pusher is None:
                    self._pusher = Pusher(service.pushers, owner)
                self._fetch = asyncio.create_task(self._pusher.fetch(request))
                self._fetch.add_done_callback(self._fetched)
                self._read_or_pause()
            case StartStream():
                self._start_stream(request)
            case _:
                reply = answer(index, service.notes, owner, request)
                if reply is not None:
                    self._send(reply)

    def _fetched(self, fetch: asyncio.Task[Fetched]) -> None:
        self._fetch = None
        if (error := fetch.exception()) is not None:
            _logger.error("a fetch of %s failed", self.name, exc_info=error)
            self.abort()
        if self._transport.is_closing():
            return
        self._send(fetch.result())
        self._take_frames()
        self._read_or_pause()

    def _replicate(self, request: Replicate) -> None:
        if self._service.replicate is not None:
            self._service.replicate(request.keys, request.target)

    def _start_stream(self, request: StartStream) -> None:
        if self._tls is not None:
            raise BadFrame("blocks over TLS")
        if len(self._frames) or self._transport.get_write_buffer_size():
            raise BadFrame("it streams before it has read all replies, or before it may")
        if self._service.streams.closed:
            self.abort()
            return
        peer: socket.socket = self._transport.get_extra_info("socket")
        try:
            self._stream = Stream(
                self._service.streams,
                self._owner,
                peer.fileno(),
                request.request_id,
                request.ring and self._service.welcome.shared is not None,
                self.name,
                self._replicate,
                self._stream_ended,
            )
        except (OSError, RuntimeError, MemoryError) as error:
            _logger.warning("%s can have no thread of its own (%s)", self.name, error)
            self._send(Streaming(request.request_id, False))
        else:
            self._read_or_pause()

    def _stream_ended(self, error: BadFrame | None) -> None:
        if error is not None:
            self._broke_protocol(error)
        else:
            self.abort()
