"""The TLS files of the control plane."""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from polarkv_sglang.doctor.findings import Facts, Finding

_VARIABLES = ("POLARKV_TLS_CERT", "POLARKV_TLS_KEY", "POLARKV_TLS_CA")
_EXPIRY_WARNING_S = 14 * 24 * 3600
_MAX_FLIGHTS = 10  # of a handshake


def check_tls(facts: Facts) -> Iterator[Finding]:
    """Shakes hands with itself, as a node and a client with these files would."""
    paths = dict(zip(_VARIABLES, facts.tls_files))
    cert, key, ca = paths.values()
    if not (cert or key or ca):
        yield Finding("tls", "ok", "not configured: the control plane is not encrypted")
        return
    if not (cert and key and ca):
        missing = " and ".join(name for name, path in paths.items() if not path)
        yield Finding("tls", "failed", f"{missing} is not set", "set all three, or none for no TLS")
        return
    for name, path in paths.items():
        if (why := _why_unreadable(Path(str(path)))) is not None:
            mend = f"let {name} name a PEM file that this user can read"
            yield Finding("tls", "failed", f"{path} cannot be read: {why}", mend)
            return
    try:
        shown = _shake_hands(cert, key, ca)
    except ssl.SSLCertVerificationError as error:
        why = error.verify_message.rstrip(".")
        mend = f"have it issued by {ca}, for server and client use, valid now"
        yield Finding("tls", "failed", f"{cert} does not pass: {why}", mend)
    except ssl.SSLError as error:
        why = (error.reason or str(error)).lower().replace("_", " ")
        mend = "give a certificate, its key (not encrypted) and the authority's certificate, all in PEM form"
        yield Finding("tls", "failed", f"{cert}, {key} and {ca} cannot be used: {why}", mend)
    else:
        yield _judge(cert, key, ca, shown)


def _judge(cert: str, key: str, ca: str, shown: Mapping[str, object]) -> Finding:
    expires = str(shown["notAfter"])
    left_s = ssl.cert_time_to_seconds(expires) - time.time()
    names = [f"{kind} {name}" for kind, name in _alternative_names(shown)]
    text = f"{cert} is signed by {ca}, names {', '.join(names) or 'no host'}, is valid until {expires}"
    details = {"names": names, "not_after": expires}
    if not names:
        mend = "nodes need a certificate with subjectAltName: clients look there for the host that they dial"
        return Finding("tls", "warning", text, mend, details)
    if left_s < _EXPIRY_WARNING_S:
        return Finding("tls", "warning", text, f"renew it: {left_s / 86400:.1f} days are left", details)
    if os.stat(key).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(
            "tls", "warning", f"others can read the key {key}; {text}", f"chmod 600 {key}", details
        )
    return Finding("tls", "ok", text, details=details)


def _shake_hands(cert: str, key: str, ca: str) -> Mapping[str, object]:
    """What the certificate says, once both ends have accepted it; SSLError."""
    client, server = (
        _context(protocol, cert, key, ca) for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
    )
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    for _ in range(_MAX_FLIGHTS):
        for end in tuple(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    shown = ends[0].getpeercert()
    return shown if not waiting and shown is not None else {}


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # which hosts it names is told; none is dialled here
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(cert, key, password="")  # a password, so that nobody is asked for one
    return context


def _alternative_names(shown: Mapping[str, object]) -> list[tuple[str, str]]:
    names = shown.get("subjectAltName", ())
    return [(str(kind), str(name)) for kind, name in names] if isinstance(names, tuple) else []


def _why_unreadable(path: Path) -> str | None:
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return error.strerror
