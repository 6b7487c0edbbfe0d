"""TLS on the control plane, always mutual: both sides show a certificate that one authority has signed."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from polarkv_sglang.errors import ConfigError

_RECORD_BYTES = 16 << 10  # OpenSSL hands out what it has decrypted in pieces of at most this
# How OpenSSL reports what the other side has against us, and what that means here.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a client certificate and we have shown none",
    "HANDSHAKE_FAILURE": "it asks for a client certificate, or shares no cipher with us",
    "CERTIFICATE_EXPIRED": "our certificate has expired",
    "CERTIFICATE_REVOKED": "our certificate is revoked",
    "UNKNOWN_CA": "our certificate is not signed by its --tls-ca",
    "PROTOCOL_VERSION": "it shares no TLS version with us",
}
_PLAIN = (
    "WRONG_VERSION_NUMBER",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
)  # versions of OpenSSL differ


class TlsFiles(NamedTuple):
    """Paths of PEM files."""

    cert: str  # ours, and the intermediate ones, if any
    key: str  # of our certificate, not encrypted
    ca: str  # who has to have signed the other side's certificate

    @classmethod
    def of(cls, cert: str | None, key: str | None, ca: str | None) -> TlsFiles | None:
        """All three, or None for none of them; ConfigError names what is missing."""
        given = {"tls-cert": cert, "tls-key": key, "tls-ca": ca}
        missing = [name for name, path in given.items() if not path]
        if len(missing) == len(given):
            return None
        if missing or not (cert and key and ca):
            raise ConfigError(
                "TLS needs a certificate, its key and an authority, but there is no "
                f"{' and no '.join(missing)}; give all three, or none for no TLS"
            )
        return cls(cert, key, ca)


def server_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """For a memory node: clients without a certificate signed by ``ca`` are turned away.

    Raises ConfigError that names the file which is missing, unreadable or wrong.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, TlsFiles(cert, key, ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # connections last for good: there is nothing to resume
    return context


def client_context(cert: str, key: str, ca: str) -> ssl.SSLContext:
    """For a client: the node's certificate must be signed by ``ca`` and name the host that was dialled.

    Raises ConfigError that names the file which is missing, unreadable or wrong.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, TlsFiles(cert, key, ca))  # checks certificate and host name


def client_tls(cert: str | None, key: str | None, ca: str | None) -> ssl.SSLContext | None:
    """``client_context`` of settings that may be left out; None if all of them are. Raises ConfigError."""
    files = TlsFiles.of(cert, key, ca)
    return client_context(*files) if files is not None else None


def explain(error: ssl.SSLError) -> tuple[bool, str]:
    """Why TLS with a memory node failed, to go on after its address; and whether the node turned us down."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return False, (
            f"shows a certificate that we do not trust: {error.verify_message.rstrip('.')}; "
            "it must be valid, signed by our tls-ca, and name the host as it is dialled"
        )
    if reason in _PLAIN:
        return False, "does not speak TLS; give it --tls-cert, --tls-key and --tls-ca, or leave ours out"
    for alert, meaning in _ALERTS.items():
        if reason.endswith(f"ALERT_{alert}"):
            return True, meaning
    return "ALERT" in reason, f"TLS failed ({reason.lower().replace('_', ' ')})"


def starts_tls(head: bytes) -> bool:
    """Whether a connection that starts so is TLS: a handshake record of a version that is in use."""
    return len(head) > 2 and head[:2] == b"\x16\x03" and head[2] in range(1, 5)


class TlsStream:
    """A memory node's end of TLS, without the socket: bytes in, bytes out.

    asyncio has one, but drops the alert that tells a client what is wrong with its certificate.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.established = False
        self.head = b""  # the first bytes of the client, for ``starts_tls``

    def receive(self, data: bytes) -> bytes:
        """What the client said in these bytes. SSLError if TLS has failed; ``outgoing`` then says why."""
        self._incoming.write(data)
        plain = bytearray()
        try:
            if not self.established:
                self.head += data[: 3 - len(self.head)]
                self._tls.do_handshake()
                self.established = True
            while part := self._tls.read(_RECORD_BYTES):
                plain += part
        except ssl.SSLWantReadError:
            pass
        return bytes(plain)

    def send(self, data: bytes | bytearray) -> None:
        """Encrypt; the handshake must be over."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]

    def outgoing(self) -> bytes:
        """What is to be sent to the client now."""
        return self._outgoing.read()


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    for path in files:
        _check_readable(path)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        raise ConfigError(f"TLS: {files.ca} holds no certificates in PEM form ({error.reason})") from error

    def no_password() -> str:
        raise ConfigError(f"TLS: key {files.key} is encrypted; store it decrypted, readable by its user only")

    try:
        context.load_cert_chain(files.cert, files.key, no_password)
    except ssl.SSLError as error:
        why = "do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "cannot be used"
        raise ConfigError(
            f"TLS: certificate {files.cert} and key {files.key} {why} ({error.reason or error})"
        ) from error
    return context


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"TLS: {path} cannot be read: {error.strerror}") from error
