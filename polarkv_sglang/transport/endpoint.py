"""A worker's way to a peer, and keys to what the peer has registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cffi import FFI

from polarkv_sglang.errors import TransportError

if TYPE_CHECKING:
    from polarkv_sglang.transport.worker import Worker

_CLOSE_NS = 1_000_000_000
_ERR_HANDLING_MODE_PEER = 1
_EP_PARAM_ADDRESS, _EP_PARAM_ERR_MODE, _EP_PARAM_ERR_HANDLER = 1 << 0, 1 << 1, 1 << 2
_EP_ATTR_TRANSPORTS = 1 << 3
_MOST_TRANSPORTS = 64
_WITHOUT_READS = frozenset({"tcp", "ud_verbs", "ud_mlx5"})  # transports that cannot read a peer's memory


class RemoteKey:
    """Access to one peer's registered memory through one endpoint; ends with the endpoint."""

    def __init__(self, endpoint: Endpoint, handle: FFI.CData) -> None:
        self.endpoint = endpoint
        self.handle = handle


class Endpoint:
    """A worker's connection to one peer. Same thread rule as its worker."""

    def __init__(self, worker: Worker, peer_address: bytes) -> None:
        library = worker.context.library
        ffi = library.ffi
        # UCX writes the failure here, from C, whenever the worker is progressed.
        self.state: FFI.CData = ffi.new("polar_endpoint *")
        address = ffi.from_buffer(peer_address)
        params = ffi.new("ucp_ep_params_t *")
        params.field_mask = _EP_PARAM_ADDRESS | _EP_PARAM_ERR_MODE | _EP_PARAM_ERR_HANDLER
        params.address = address
        params.err_mode = _ERR_HANDLING_MODE_PEER
        params.err_handler.cb = ffi.cast("ucp_err_handler_cb_t", library.batch.polar_endpoint_failed)
        params.err_handler.arg = worker.state  # which outlives all that UCX reports, unlike an endpoint's
        handle = ffi.new("ucp_ep_h *")
        status = library.ucp.ucp_ep_create(worker.handle, params, handle)
        library.check(status, "make an endpoint (peer error handling needs tcp in UCX_TLS)")
        self.state.handle = handle[0]
        library.batch.polar_add_endpoint(worker.state, self.state)
        self.worker = worker
        self._keys: list[RemoteKey] = []

    @property
    def failed(self) -> str | None:
        """Why the endpoint cannot be used any more, or None; the way on is close() and a new connect()."""
        return self.worker.context.library.describe(self.state.status) if self.state.status else None

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of the UCX transports that the endpoint uses, sorted. Raises TransportError."""
        library = self.worker.context.library
        ffi = library.ffi
        if self.failed:
            raise TransportError(f"endpoint failed: {self.failed}; connect again")
        entries = ffi.new("ucp_transport_entry_t[]", _MOST_TRANSPORTS)
        attributes = ffi.new("ucp_ep_attr_t *")
        attributes.field_mask = _EP_ATTR_TRANSPORTS
        attributes.transports.entries = entries
        attributes.transports.num_entries = len(entries)
        attributes.transports.entry_size = ffi.sizeof("ucp_transport_entry_t")
        library.check(
            library.ucp.ucp_ep_query(self.state.handle, attributes), "read an endpoint's transports"
        )
        count = attributes.transports.num_entries
        return tuple(sorted({ffi.string(entry.transport_name).decode() for entry in entries[0:count]}))

    @property
    def emulates_get(self) -> bool:
        """Whether the peer's process has a part in every get, as over tcp: its own put is faster then."""
        return set(self.transports) <= _WITHOUT_READS

    def unpack(self, rkey: bytes) -> RemoteKey:
        """Makes a peer's packed key usable here. Raises TransportError."""
        library = self.worker.context.library
        if self.failed:
            raise TransportError(f"endpoint failed: {self.failed}; connect again")
        handle = library.ffi.new("ucp_rkey_h *")
        status = library.ucp.ucp_ep_rkey_unpack(self.state.handle, library.ffi.from_buffer(rkey), handle)
        library.check(status, "unpack a remote key")
        key = RemoteKey(self, handle[0])
        self._keys.append(key)
        return key

    def close(self, *, force: bool = False) -> None:
        """Gives up the endpoint and its keys; without `force` the peer is told, which may take a second."""
        library = self.worker.context.library
        while self._keys:
            library.ucp.ucp_rkey_destroy(self._keys.pop().handle)
        library.batch.polar_close(self.worker.state, self.state, force, _CLOSE_NS)
        library.batch.polar_remove_endpoint(self.worker.state, self.state)
        self.worker.endpoints.discard(self)
