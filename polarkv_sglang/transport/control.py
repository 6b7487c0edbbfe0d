"""The client's end of the control plane: one blocking connection to a memory node, with deadlines."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import ssl
import struct
import time
from collections.abc import Sized
from operator import attrgetter
from typing import Self, overload

from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.transport.framing import (
    MAX_FRAME_BYTES,
    BadFrame,
    FrameReader,
    decode_from_node,
    encode_frame,
    prove,
)
from polarkv_sglang.transport.messages import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Answered,
    Challenge,
    Commit,
    Committed,
    Fetch,
    Fetched,
    Fill,
    FromNode,
    Grant,
    Granted,
    Held,
    Hello,
    Hold,
    Locate,
    Located,
    Message,
    NodeStatistics,
    NotesRead,
    Peek,
    Peeked,
    Proof,
    Pull,
    Pulled,
    ReadNotes,
    Refused,
    Release,
    Renew,
    Renewed,
    Reply,
    Request,
    Reserve,
    Reserved,
    Role,
    StartStream,
    Statistics,
    Store,
    Stored,
    Streaming,
    Used,
    Welcome,
)
from polarkv_sglang.transport.quick import QuickSocket, bound_send_buffer, connect_unpaced, is_to_own_host
from polarkv_sglang.transport.tls import explain

# Beyond what the node has room for; what waits for the next message is less.
_MUCH_UNREAD_BYTES = 256 << 10
SEND_DEADLINE_S = 1.0  # a request fits the socket's buffer unless the node has stopped reading
PATIENCE_S = 300e-6  # a reply is waited for so long without giving up the GIL; most take less
PATIENCE_BYTE_S = 100e-9  # and for each byte of its request: a batch of keys takes a node longer
LONGEST_PATIENCE_S = 1e-3  # a fifth of what getting the GIL back takes beside a busy thread
_RECEIVE_BYTES = 256 << 10
_DROP_UNSENT = struct.pack("ii", 1, 0)  # struct linger
_QUICK_BYTES = 64 << 10
_OUT_OF_TIME = (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class NodeRefused(NodeError):
    """The memory node answered and declined us: token, protocol version or role."""


class NodeTimeout(NodeError):
    """The memory node did not answer within the deadline; the connection must be closed."""


class ControlConnection:
    """An authenticated connection to one memory node.

    Used by one thread at a time. Requests may be pipelined with ``send`` and ``receive``: replies come
    in the order of the requests. After any NodeError the connection is unusable and closes itself;
    its leases and reservations stay with the node until they expire.
    """

    welcome: Welcome  # what the node said of itself: incarnation, worker address, rkey, slab

    def __init__(self, sock: socket.socket, address: str) -> None:
        """Internal: use ``connect``."""
        self.address = address
        self._socket = sock
        self._quick: QuickSocket | None = None  # not for TLS
        self._postponed = False  # a message waits for the next one
        self._frames = FrameReader(MAX_FRAME_BYTES)
        self._request_ids = itertools.count(1)
        self._closed: str | None = None  # why, once it is
        self._patience_s = PATIENCE_S
        self.is_on_own_host = False  # whether the node is, once it streams

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        token: str | None,
        role: Role,
        client: str,
        deadline_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> ControlConnection:
        """Connect to ``host:port`` and authenticate, all within ``deadline_s`` seconds.

        ``tls``: see ``tls.client_context``; None: in the clear. Raises NodeRefused if the node declines us,
        NodeTimeout if it does not answer in time, NodeError if it is not there, does not speak the protocol
        or shows a certificate that we do not trust, ConfigError if the address is malformed.
        """
        deadline = time.monotonic() + deadline_s
        connection = cls(_open_socket(address, deadline, deadline_s), address)
        try:
            if tls is not None:
                connection._secure(tls, deadline)
            else:
                connection._quick = QuickSocket(connection._socket, _QUICK_BYTES)
            connection.welcome = connection._authenticate(token, role, client, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def next_id(self) -> int:
        """A request_id that this connection has not used yet."""
        return next(self._request_ids)

    def send(self, message: Request, deadline_s: float = SEND_DEADLINE_S) -> None:
        """Send one message; NodeError if the node is gone or reads nothing for ``deadline_s`` seconds."""
        self._send(message, time.monotonic() + deadline_s)

    def send_later(self, message: Release, deadline_s: float) -> None:
        """Send what can wait: with the next request, or in 200 ms; under TLS at once. Raises as ``send``."""
        self._send(message, time.monotonic() + deadline_s, more=True)
        self._postponed = True

    def hint(self, message: Used, deadline_s: float) -> None:
        """As ``send_later``, but at once if something waits already, and not at all if much is unread."""
        self._check_open()
        if self._quick is not None and self._quick.unsent() > _MUCH_UNREAD_BYTES:
            return
        self._send(message, time.monotonic() + deadline_s, more=not self._postponed)

    def receive(self, deadline: float) -> FromNode:
        """The next message of the node, by ``deadline`` (time.monotonic).

        Raises NodeTimeout past the deadline, NodeError if the node is gone or sent garbage.
        """
        try:
            while (frame := self._frames.next_frame()) is None:
                data = self._read(deadline)
                if not data:
                    raise self._failed("closed the connection")
                self._frames.feed(data)
            return decode_from_node(frame)
        except _OUT_OF_TIME as error:
            raise self._timed_out("did not answer in time") from error
        except ssl.SSLError as error:
            raise self._tls_failed(error) from error
        except OSError as error:
            raise self._failed(f"is gone ({error.strerror or error})") from error
        except BadFrame as error:
            raise self._failed(f"broke the protocol: {error}") from error

    @overload
    def request(self, message: Reserve, deadline_s: float) -> Reserved: ...
    @overload
    def request(self, message: Commit, deadline_s: float) -> Committed: ...
    @overload
    def request(self, message: Grant, deadline_s: float) -> Granted: ...
    @overload
    def request(self, message: Locate, deadline_s: float) -> Located: ...
    @overload
    def request(self, message: Hold, deadline_s: float) -> Held: ...
    @overload
    def request(self, message: Renew, deadline_s: float) -> Renewed: ...
    @overload
    def request(self, message: Fetch, deadline_s: float) -> Fetched: ...
    @overload
    def request(self, message: StartStream, deadline_s: float) -> Streaming: ...
    @overload
    def request(self, message: Peek, deadline_s: float) -> Peeked: ...
    @overload
    def request(self, message: Statistics, deadline_s: float) -> NodeStatistics: ...
    def request(self, message: Answered, deadline_s: float) -> Reply:
        """Send a request and return its reply, within ``deadline_s`` seconds.

        The reply answers as many keys as were asked for. Raises as ``send`` and ``receive`` do.
        """
        deadline = time.monotonic() + deadline_s
        self._send(message, deadline)
        reply = self.receive(deadline)
        if not (isinstance(reply, Reply) and answers(reply, message)):
            raise self._failed(f"broke the protocol: {type(message).__name__} was not answered properly")
        return reply

    @property
    def can_stream(self) -> bool:
        """Whether blocks can go through this connection: not over TLS, which would have to encrypt them."""
        return self._quick is not None

    def start_streaming(self, deadline_s: float, *, ring: bool = False) -> Streaming:
        """Ask to be served by a thread of the node's, see ``StartStream``. Raises as ``request``."""
        with contextlib.suppress(OSError):  # the request will tell
            bound_send_buffer(self._socket)
            self.is_on_own_host = is_to_own_host(self._socket)
        return self.request(StartStream(self.next_id(), ring), deadline_s)

    def give_up(self, reason: str) -> NodeError:
        """Close the connection after an exchange that failed on it; the error to report.

        What was not sent yet is dropped: of pages that the socket was lent it may be other bytes from now on.
        """
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP_UNSENT)
        return self._failed(reason)

    def start_exchange(self) -> int:
        """The socket, for an exchange without us: nothing may be left of earlier ones. Raises NodeError."""
        if self._closed is not None or len(self._frames):
            self._check_open()
            raise self._failed("broke the protocol: it sent what was not asked for")
        self._postponed = False
        return self._socket.fileno()

    def fileno(self) -> int:
        """The socket, for select and poll; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection; harmless if it is closed already."""
        self._closed = self._closed or "is closed on our side"
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _secure(self, tls: ssl.SSLContext, deadline: float) -> None:
        host, _ = parse_address(self.address)
        try:
            self._arm(deadline)
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        except TimeoutError as error:
            raise self._timed_out("did not answer in time") from error
        except ssl.SSLError as error:
            raise self._tls_failed(error) from error
        except OSError as error:
            raise self._failed(f"closed the connection instead of speaking TLS ({error.strerror})") from error

    def _authenticate(self, token: str | None, role: Role, client: str, deadline: float) -> Welcome:
        nonce = os.urandom(NONCE_BYTES)
        self._send(Hello(PROTOCOL_VERSION, role, client, nonce), deadline)
        challenge = self._receive_or_refused(deadline)
        if not isinstance(challenge, Challenge):
            raise self._failed("broke the protocol: it did not answer Hello with Challenge")
        if challenge.protocol_version != PROTOCOL_VERSION:
            raise self._failed(
                f"speaks protocol {challenge.protocol_version}, we speak {PROTOCOL_VERSION}; "
                "install one PolarKV version everywhere"
            )
        if challenge.auth_required and token is None:
            raise self._refused("it asks for a token and we have none; set POLARKV_TOKEN")
        mac = prove(token, nonce, challenge.nonce) if challenge.auth_required and token is not None else b""
        self._send(Proof(mac), deadline)
        welcome = self._receive_or_refused(deadline)
        if not isinstance(welcome, Welcome):
            raise self._failed("broke the protocol: it did not answer Proof with Welcome")
        return welcome

    def _receive_or_refused(self, deadline: float) -> FromNode:
        message = self.receive(deadline)
        if isinstance(message, Refused):
            raise self._refused(message.reason)
        return message

    def _read(self, deadline: float) -> bytes | memoryview:
        self._check_open()
        if self._quick is not None:
            patience_s = min(self._patience_s, deadline - time.monotonic())
            if (data := self._quick.receive(patience_s)) is not None:
                return data
        self._arm(deadline)
        return self._socket.recv(_RECEIVE_BYTES)

    def _send(self, message: Message, deadline: float, *, more: bool = False) -> None:
        try:
            self._check_open()
            data = bytes(encode_frame(message))
            self._patience_s = min(PATIENCE_S + PATIENCE_BYTE_S * len(data), LONGEST_PATIENCE_S)
            self._postponed &= more
            rest = memoryview(data)[self._quick.send(data, more=more) if self._quick is not None else 0 :]
            while rest:
                self._arm(deadline)
                rest = rest[self._socket.send(rest) :]
        except _OUT_OF_TIME as error:
            raise self._timed_out("does not read what we send") from error
        except ssl.SSLError as error:
            raise self._tls_failed(error) from error
        except OSError as error:
            raise self._failed(f"is gone ({error.strerror or error})") from error

    def _check_open(self) -> None:
        if self._closed is not None:
            raise NodeError(f"memory node {self.address} {self._closed}")

    def _arm(self, deadline: float) -> None:
        """Let the next socket call last until ``deadline``."""
        # Past the deadline what has arrived is still taken: another node may have used the time up.
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))

    # A failure may leave half a frame on the stream, so each of them ends the connection.
    def _failed(self, reason: str) -> NodeError:
        return self._close_with(NodeError(f"memory node {self.address} {reason}"), reason)

    def _timed_out(self, reason: str) -> NodeError:
        return self._close_with(NodeTimeout(f"memory node {self.address} {reason}"), reason)

    def _tls_failed(self, error: ssl.SSLError) -> NodeError:
        refused, reason = explain(error)
        return self._refused(reason) if refused else self._failed(reason)

    def _refused(self, reason: str) -> NodeError:
        return self._close_with(NodeRefused(f"memory node {self.address} refused us: {reason}"), reason)

    def _close_with(self, error: NodeError, reason: str) -> NodeError:
        self._closed = self._closed or reason
        self._socket.close()
        return error


def _open_socket(address: str, deadline: float, deadline_s: float) -> socket.socket:
    host, port = parse_address(address)
    last: OSError | None = None
    try:
        for family, kind, protocol, _, resolved in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                connect_unpaced(sock, resolved)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                last = error
            else:
                return sock
    except socket.gaierror as error:
        raise NodeError(f"memory node {address} cannot be found: {error.strerror}") from error
    except UnicodeError as error:
        raise NodeError(f"memory node {address} cannot be found: {host!r} is not a host name") from error
    except OSError as error:  # no descriptor left
        raise NodeError(f"memory node {address} cannot be reached: {error.strerror}") from error
    if isinstance(last, TimeoutError):
        raise NodeTimeout(f"memory node {address} does not answer within {deadline_s:g} s") from last
    reason = last.strerror if last is not None else "no address"
    raise NodeError(f"memory node {address} cannot be reached: {reason}; is it running there?") from last


_keys = attrgetter("keys")
# What answers a request, and where it has one entry per key: these, and how many bytes one of them is.
_REPLIES: dict[type[Message], tuple[type[Message], attrgetter[Sized] | None, int]] = {
    Reserve: (Reserved, attrgetter("states"), 1),
    Commit: (Committed, None, 0),
    Grant: (Granted, None, 0),
    Locate: (Located, attrgetter("address_blob"), 8),
    Hold: (Held, attrgetter("present"), 1),
    Renew: (Renewed, None, 0),
    Fetch: (Fetched, attrgetter("states"), 1),
    StartStream: (Streaming, None, 0),
    Pull: (Pulled, attrgetter("checksum_blob"), 8),
    Store: (Stored, attrgetter("states"), 1),
    Fill: (Committed, None, 0),
    Peek: (Peeked, attrgetter("present"), 1),
    ReadNotes: (NotesRead, attrgetter("notes"), 1),
    Statistics: (NodeStatistics, None, 0),
}


def answers(reply: Reply, request: Answered) -> bool:
    """Whether this is the reply to that request, for as many keys; for those who pipeline requests."""
    reply_type, entries, entry_bytes = _REPLIES[type(request)]
    if type(reply) is not reply_type or reply.request_id != request.request_id:
        return False
    if entries is None:
        return True
    keys, asked = len(entries(reply)) // entry_bytes, len(_keys(request)) // KEY_BYTES
    return keys == asked or (keys < asked and reply_type is Pulled)  # it has the leading ones only
