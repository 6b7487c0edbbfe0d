"""Socket calls that keep the GIL.

Python's own give it up whatever they do, and beside a busy Python thread getting it back takes a switch
interval (5 ms): fifty times what a memory node needs to answer. These last for microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import termios
import time

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: calls keep the GIL
_send = _libc.send
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_send.restype = ctypes.c_ssize_t
_recv = _libc.recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int
_sched_yield = _libc.sched_yield
_NOT_NOW = (errno.EAGAIN, errno.EINTR)
_SEND_BUFFER_BYTES = 256 << 10  # Linux doubles it
_RENO = b"reno"  # which every kernel has

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]  # as of getaddrinfo


def bound_send_buffer(sock: socket.socket) -> None:
    """Let little wait in a connected socket to this very host; Linux would let it grow to some MiB.

    What waits is read from a cache then: many MiB take less time. Raises OSError.
    """
    if is_to_own_host(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


def connect_unpaced(sock: socket.socket, address: SocketAddress) -> None:
    """Connect; within this very host by TCP Reno, whatever the host's congestion control is. Raises OSError.

    BBR sends no faster than what it takes for the rate of a link, which is less than that of memory. Reno
    has to be chosen before: a connection that has begun with BBR stays paced. For clients only: nodes that
    did the same were measured to answer small gets at half the rate.
    """
    with contextlib.suppress(OSError), socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        if probe.getsockname()[0] == address[0]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _RENO)
    sock.connect(address)


def is_to_own_host(sock: socket.socket) -> bool:
    """Whether both ends of a connected socket have one address, be it a tunnel's. Raises OSError."""
    same: bool = sock.getpeername()[0] == sock.getsockname()[0]
    return same


class QuickSocket:
    """The quick calls on one connected socket; its owner closes it."""

    def __init__(self, sock: socket.socket, buffer_bytes: int) -> None:
        self._fd = sock.fileno()
        self._buffer = bytearray(buffer_bytes)
        self._view = memoryview(self._buffer)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def send(self, data: bytes, *, more: bool = False) -> int:
        """How many bytes the socket's buffer took, without waiting. Raises OSError.

        With ``more`` they go out with what is sent next, or by themselves after 200 ms: it costs neither a
        segment nor, on one core, the time that the peer takes to read it.
        """
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
        return _result(_send(self._fd, data, len(data), flags)) or 0

    def unsent(self) -> int:
        """Bytes that the peer has no room for yet, or that wait for more. Raises OSError."""
        count = ctypes.c_int()
        _result(_ioctl(self._fd, termios.TIOCOUTQ, ctypes.byref(count)))
        return count.value

    def receive(self, patience_s: float) -> memoryview | None:
        """What has arrived, or does within ``patience_s``; empty at the end, None if nothing did.

        Valid until the next call. Raises OSError.
        """
        until = time.monotonic() + patience_s
        while (size := self._receive_now()) is None:
            if time.monotonic() >= until:
                return None
            _sched_yield()  # the node may be waiting for this very core
        return self._view[:size]

    def _receive_now(self) -> int | None:
        return _result(_recv(self._fd, self._address, len(self._buffer), socket.MSG_DONTWAIT))


def _result(returned: int) -> int | None:
    """What a call returned, None if it would have had to wait."""
    if returned >= 0:
        return returned
    number = ctypes.get_errno()
    if number in _NOT_NOW:
        return None
    raise OSError(number, os.strerror(number))
