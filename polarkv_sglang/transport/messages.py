"""Messages of the control plane: typed structs, MessagePack on the wire, keys and numbers as flat blobs.

One blob of n * 16 bytes decodes fifty times faster than a list of n keys. ``*_blob`` fields hold
little-endian u64, one per key of the request unless said otherwise.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

import msgspec

from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.transport.columns import seal, unpack_u64
from polarkv_sglang.transport.shared import SharedHandle

PROTOCOL_VERSION = 7
MAX_KEYS = 8192  # keys in one request: bounds how long one message can hold the memory node
MAX_GRANTED = 256  # slots that one writer has ahead
RESERVATION_S = 30.0  # slots are a writer's so long, reserved or granted
MAX_LEASE_S = 60.0  # a longer lease is shortened to this
MAX_FETCH_S = 10.0  # so is a longer time to fetch in: a node that is told to stop waits for its puts
MAX_FETCH_REGIONS = 64
MAX_PULL_PARTS = 64
MAX_PULL_RUNS = 1 << 14  # of bytes, in all blocks of one Pull
MAX_FETCH_TARGETS = 1 << 17  # pieces of all keys of one Fetch
MAX_VIEW_NODES = 1024
MAX_NOTES = 512  # in one request: all of them fit a frame
MAX_NOTE_BYTES = 4 << 10
NONCE_BYTES = 16
NODE_ID_BYTES = 16

Role = Literal["rank", "observer", "lifeline"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
NodeId = Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
BlockLength = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
NodeAddress = Annotated[str, msgspec.Meta(max_length=256)]  # host:port
WorkerAddress = Annotated[bytes, msgspec.Meta(max_length=32 << 10)]
PackedKey = Annotated[bytes, msgspec.Meta(max_length=16 << 10)]
Reason = Annotated[str, msgspec.Meta(max_length=512)]
Padding = Annotated[bytes, msgspec.Meta(max_length=64)]
Note = Annotated[bytes, msgspec.Meta(max_length=MAX_NOTE_BYTES)]


class KeyState(IntEnum):
    """What ``Reserve`` did for one key."""

    RESERVED = 0  # a slot is ours to write
    PRESENT = 1  # the block is in the pool already
    NO_ROOM = 2  # nothing could be evicted for it, or the block is longer than a segment
    BUSY = 3  # another writer has reserved it


class FetchState(IntEnum):
    """What ``Fetch`` did for one key."""

    MISS = 0  # not here with that length, or behind the first key that was not
    SENT = 1  # all of its bytes are in the client's memory
    FAILED = 2  # it is here, but did not reach the client in time


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages; positional on the wire, so that fields may only change with the version."""


# The handshake must be readable across versions, so that a mismatch can be named: unknown trailing
# fields are ignored in these three, and their first fields never change.
class Hello(Message, frozen=True, tag="hello", forbid_unknown_fields=False):
    """Client to node, first."""

    protocol_version: int
    role: Role
    client: Annotated[str, msgspec.Meta(max_length=256)]  # a name for logs
    nonce: Nonce


class Challenge(Message, frozen=True, tag="challenge", forbid_unknown_fields=False):
    """Node to client: the same protocol version is spoken here; prove that you know the token."""

    protocol_version: int
    nonce: Nonce
    auth_required: bool


class Refused(Message, frozen=True, tag="refused", forbid_unknown_fields=False):
    """Node to client, instead of ``Challenge`` or ``Welcome``; the connection is closed after it."""

    reason: str


class Proof(Message, frozen=True, tag="proof"):
    """Client to node: HMAC-SHA256 of both nonces under the token; empty where none is required."""

    mac: Annotated[bytes, msgspec.Meta(max_length=32)]


class Welcome(Message, frozen=True, tag="welcome"):
    """Node to client: authenticated. Only ranks are given the ways to the slab: address, rkey, handles."""

    node_id: NodeId  # new at every start of the node: another id means that all blocks are gone
    worker_address: bytes
    rkey: bytes
    base_address: Count  # of the slab, in the node's address space
    capacity_bytes: Count
    segment_bytes: Count  # no block can be longer
    shared: SharedHandle | None = None  # of the slab, for ranks on the node's host; None: not offered
    directory: SharedHandle | None = None  # likewise, of what tells where blocks lie in it
    most_granted_bytes: Count = 0  # see Grant


class Reserve(Message, frozen=True, tag="reserve"):
    """Ask for slots to write blocks of ``length`` bytes into; prefix order, parents before children."""

    request_id: Count
    keys: bytes
    parents: bytes  # key of the preceding page of each; NO_PARENT where there is none
    length: BlockLength

    def __post_init__(self) -> None:
        _check_keys(self.keys)
        if len(self.parents) != len(self.keys):
            raise ValueError("parents and keys differ in length")


class Reserved(Message, frozen=True, tag="reserved"):
    """Slots, until committed or expired (30 s). Only keys in state RESERVED have an address."""

    request_id: Count
    reservation: Count  # 0: no key was reserved, there is nothing to commit
    address_blob: bytes  # remote address to put to; 0 where not reserved
    states: bytes  # one KeyState per key

    def __post_init__(self) -> None:
        _check_columns(len(self.states), self.address_blob)


class Commit(Message, frozen=True, tag="commit"):
    """End a reservation; ``mask`` and ``checksum_blob`` have one entry per key in state RESERVED, in order.

    Mask 1 makes the block visible. Mask 0 frees its slot at once: only for puts that are known to have
    ended. Where one may still be under way, send no Commit and let the reservation expire.
    """

    request_id: Count
    reservation: Count
    mask: bytes
    checksum_blob: bytes

    def __post_init__(self) -> None:
        if len(self.mask) > MAX_KEYS:
            raise ValueError(f"more than {MAX_KEYS} keys")
        _check_columns(len(self.mask), self.checksum_blob)


class Committed(Message, frozen=True, tag="committed"):
    """How many blocks became visible; fewer than asked for where the reservation had expired."""

    request_id: Count
    count: Count


class Grant(Message, frozen=True, tag="grant"):
    """Ask for slots ahead, for blocks of ``length`` bytes that will be told of in the connection's ring.

    What was granted to this connection before and is not written by then is not granted any more. They are
    all granted or none: none if they are of more bytes than ``Welcome`` allows.
    """

    request_id: Count
    length: BlockLength
    slots: Annotated[int, msgspec.Meta(ge=1, le=MAX_GRANTED)]


class Granted(Message, frozen=True, tag="granted"):
    """Slots, until blocks are told to be there or the grant has expired (RESERVATION_S)."""

    request_id: Count
    address_blob: bytes  # as many as were asked for; none if there is no room, or no ring

    def __post_init__(self) -> None:
        _check_columns(len(self.address_blob) // 8, self.address_blob)


class Locate(Message, frozen=True, tag="locate"):
    """Find blocks to read, and keep them where they are for ``lease_s`` seconds (at most MAX_LEASE_S)."""

    request_id: Count
    keys: bytes
    lease_s: float

    def __post_init__(self) -> None:
        _check_keys(self.keys)
        _check_seconds("lease_s", self.lease_s)


class Located(Message, frozen=True, tag="located"):
    """Every key is answered; the longest prefix is the client's business."""

    request_id: Count
    lease: Count  # 0: no key was found, there is nothing to release
    address_blob: bytes  # remote address to get from; 0: a miss, and so are the other columns
    length_blob: bytes
    checksum_blob: bytes
    generation_blob: bytes

    def __post_init__(self) -> None:
        _check_columns(
            len(self.address_blob) // 8,
            self.address_blob,
            self.length_blob,
            self.checksum_blob,
            self.generation_blob,
        )


class Hold(Message, frozen=True, tag="hold"):
    """Which keys are in the pool, and keep those for ``lease_s`` seconds (at most MAX_LEASE_S): not touched.

    For requests that wait and will read them. All such leases together keep no more than a share of a memory
    node (see ``Index.hold``): beyond it keys are answered without a lease.
    """

    request_id: Count
    keys: bytes
    lease_s: float

    def __post_init__(self) -> None:
        _check_keys(self.keys)
        _check_seconds("lease_s", self.lease_s)


class Held(Message, frozen=True, tag="held"):
    """One byte per key: 1 present, 0 absent."""

    request_id: Count
    lease: Count  # 0: nothing is kept, there is nothing to release
    present: bytes


class Renew(Message, frozen=True, tag="renew"):
    """Let a lease last ``lease_s`` seconds from now (at most MAX_LEASE_S)."""

    request_id: Count
    lease: Count
    lease_s: float

    def __post_init__(self) -> None:
        _check_seconds("lease_s", self.lease_s)


class Renewed(Message, frozen=True, tag="renewed"):
    """``held``: the lease lasts on. If not, its blocks may have been evicted since it expired."""

    request_id: Count
    held: bool


class Fetch(Message, frozen=True, tag="fetch"):
    """Have the node put blocks into the client's registered memory: for links that emulate gets.

    Only the leading run of keys that are here, as blocks of ``pieces * piece_bytes``, is sent. The node
    answers once its puts have ended, or ``timeout_s`` seconds (at most MAX_FETCH_S) after it read this;
    until then it reads nothing else of this connection. The client progresses its worker meanwhile.
    Where no SENT has come, what is on its way may still reach the client's memory: it must not be used
    again before the worker is closed.
    """

    request_id: Count
    keys: bytes
    timeout_s: float
    worker_address: WorkerAddress  # the client's
    rkeys: Annotated[list[PackedKey], msgspec.Meta(min_length=1, max_length=MAX_FETCH_REGIONS)]
    seal: Count  # see ``seal``
    pieces: Annotated[int, msgspec.Meta(ge=1, le=MAX_FETCH_TARGETS)]  # of each block
    piece_bytes: BlockLength
    target_blob: bytes  # keys * pieces addresses in the client's memory, block by block
    region_blob: bytes  # for each of them, whose rkey covers it

    def __post_init__(self) -> None:
        _check_seconds("timeout_s", self.timeout_s)
        targets = _check_keys(self.keys) * self.pieces
        if targets > MAX_FETCH_TARGETS:
            raise ValueError(f"{targets} pieces, more than {MAX_FETCH_TARGETS}; ask for fewer keys at once")
        _check_columns(targets, self.target_blob, self.region_blob)
        if targets and unpack_u64(self.region_blob).max() >= len(self.rkeys):
            raise ValueError(f"a region is not among the {len(self.rkeys)} rkeys")
        if self.seal != seal(self.worker_address, self.rkeys):
            raise ValueError("worker_address and rkeys do not match their seal")


class Fetched(Message, frozen=True, tag="fetched"):
    """What became of each key; what was SENT is to be checked against its checksum, as after a get."""

    request_id: Count
    states: bytes  # one FetchState per key
    checksum_blob: bytes  # 0 where not SENT, and so is the next
    generation_blob: bytes

    def __post_init__(self) -> None:
        _check_columns(len(self.states), self.checksum_blob, self.generation_blob)


class StartStream(Message, frozen=True, tag="start_stream"):
    """Have a thread of the node serve this connection from now on, at once and by itself; not over TLS.

    It takes what is answered from index or notes alone, ``Replicate``, and where blocks are to go through the
    connection ``Pull``, ``Store`` and ``Fill``. Nothing may be sent before ``Streaming`` has come.
    """

    request_id: Count
    ring: bool = False  # a ring of notices is wanted, which processes on the node's host can map


class Streaming(Message, frozen=True, tag="streaming"):
    """Requests may be sent, and blocks if there is a thread: else the connection goes on as before."""

    request_id: Count
    threaded: bool
    ring: SharedHandle | None = None  # see ring.h; heard until the connection ends


class Pull(Message, frozen=True, tag="pull"):
    """Read blocks of ``length`` bytes through a connection that streams.

    Or parts of them, the same of each: so layers can come one after another, by a Pull each.
    """

    request_id: Count
    keys: bytes
    length: BlockLength
    part_blob: bytes = b""  # for each part where in a block it begins, and its bytes; empty: whole blocks

    def __post_init__(self) -> None:
        count = _check_keys(self.keys)
        if not self.part_blob:  # whole blocks are as many runs as keys, at most
            return
        parts = self.parts()
        if count * len(parts) > MAX_PULL_RUNS:
            raise ValueError(f"{count} keys in {len(parts)} parts are more than {MAX_PULL_RUNS} runs")
        if not all(0 < size <= self.length - start for start, size in parts):
            raise ValueError(f"a part is empty, or leaves its block of {self.length} bytes")

    def parts(self) -> list[tuple[int, int]]:
        """Of each where in a block it begins, and its bytes."""
        if not self.part_blob:
            return [(0, self.length)]
        if len(self.part_blob) % 16 or len(self.part_blob) > 16 * MAX_PULL_PARTS:
            raise ValueError(f"parts are no pairs of numbers, or more than {MAX_PULL_PARTS}")
        numbers = unpack_u64(self.part_blob).tolist()
        return list(zip(numbers[::2], numbers[1::2]))


class Pulled(Message, frozen=True, tag="pulled"):
    """How many leading keys are here, as blocks of that length. To be checked, as after a get.

    Behind this frame come the number of bytes of all that is sent of these blocks, as a little-endian u64,
    and the bytes, block by block.
    """

    request_id: Count
    checksum_blob: bytes
    generation_blob: bytes
    padding: Padding = b""  # see ``encode_before``

    def __post_init__(self) -> None:
        if len(self.checksum_blob) % 8 or len(self.generation_blob) != len(self.checksum_blob):
            raise ValueError("checksums or generations are no numbers of 8 bytes for as many keys")


class Store(Message, frozen=True, tag="store"):
    """Write few blocks through a connection that streams: in one exchange, where most of them will be new.

    Behind this frame come the bytes of all blocks, whatever becomes of them, then per block a checksum
    (little-endian u64), then per block one byte: 1 if it is to be stored.
    """

    request_id: Count
    keys: bytes
    parents: bytes
    length: BlockLength
    padding: Padding = b""  # see ``encode_before``

    def __post_init__(self) -> None:
        _check_keys(self.keys)
        if len(self.parents) != len(self.keys):
            raise ValueError("parents and keys differ in length")


class Stored(Message, frozen=True, tag="stored"):
    """What became of each key; one in state RESERVED is visible now if it was to be stored."""

    request_id: Count
    states: bytes  # one KeyState per key


class Fill(Message, frozen=True, tag="fill"):
    """Write the blocks of a reservation, and commit them, through a connection that streams.

    Behind this frame comes what comes behind ``Store``, for the keys in state RESERVED only; ``Committed``
    answers it.
    """

    request_id: Count
    reservation: Count
    padding: Padding = b""  # see ``encode_before``


class Release(Message, frozen=True, tag="release"):
    """End a lease; one way. Its blocks must not be read any more."""

    lease: Count


class Used(Message, frozen=True, tag="used"):
    """Blocks were read that the client found by itself; one way."""

    keys: bytes

    def __post_init__(self) -> None:
        _check_keys(self.keys)


class ReportCorrupt(Message, frozen=True, tag="report_corrupt"):
    """Blocks whose checksum was wrong after a get; one way. Dropped if they are still that generation."""

    keys: bytes
    generation_blob: bytes

    def __post_init__(self) -> None:
        _check_columns(_check_keys(self.keys), self.generation_blob)


class Peek(Message, frozen=True, tag="peek"):
    """Which keys are in the pool; neither touches nor leases them."""

    request_id: Count
    keys: bytes

    def __post_init__(self) -> None:
        _check_keys(self.keys)


class Peeked(Message, frozen=True, tag="peeked"):
    """One byte per key: 1 present, 0 absent."""

    request_id: Count
    present: bytes


class Replicate(Message, frozen=True, tag="replicate"):
    """Copy blocks to another memory node, as far as they are here and missing there; one way, best effort."""

    keys: bytes  # in prefix order
    target: NodeAddress

    def __post_init__(self) -> None:
        _check_keys(self.keys)


class WriteNotes(Message, frozen=True, tag="write_notes"):
    """Keep small values beside the blocks, instead of what was there under their keys; one way."""

    keys: bytes
    notes: Annotated[list[Note], msgspec.Meta(max_length=MAX_NOTES)]  # one per key, none of them empty

    def __post_init__(self) -> None:
        if _check_keys(self.keys) != len(self.notes) or b"" in self.notes:
            raise ValueError("keys and notes do not go together")


class ReadNotes(Message, frozen=True, tag="read_notes"):
    """Ask for notes."""

    request_id: Count
    keys: bytes

    def __post_init__(self) -> None:
        if _check_keys(self.keys) > MAX_NOTES:
            raise ValueError(f"more than {MAX_NOTES} notes")


class NotesRead(Message, frozen=True, tag="notes_read"):
    """The note of each key; empty where there is none."""

    request_id: Count
    notes: Annotated[list[Note], msgspec.Meta(max_length=MAX_NOTES)]


class View(Message, frozen=True, tag="view"):
    """The memory nodes that this rank cannot use, and why; one way. The last one counts."""

    out: Annotated[dict[NodeAddress, Reason], msgspec.Meta(max_length=MAX_VIEW_NODES)]


class Statistics(Message, frozen=True, tag="statistics"):
    """Ask for ``NodeStatistics``."""

    request_id: Count


class NodeStatistics(Message, frozen=True, tag="node_statistics", kw_only=True):
    """A memory node at one moment; counters (``*_total``) count since its start."""

    request_id: Count
    node_id: NodeId
    version: str  # of PolarKV
    libucp: str  # version and where it was found
    pages: str  # that back the slab: "hugetlb", "transparent" or "4 KiB pages"
    uptime_s: float
    capacity_bytes: Count
    used_bytes: Count  # slots of blocks that are here or being written, whole
    granted_bytes: Count  # slots that writers on this host have ahead, whole
    blocks: Count  # committed
    reservations: Count
    leases: Count  # of reads, and of requests that wait
    leased_bytes: Count  # in blocks that have at least one
    quarantined_blocks: Count  # dropped, but still leased
    notes_bytes: Count  # in notes, which lie beside the slab
    connections: Count
    hits_total: Count
    misses_total: Count
    commits_total: Count
    late_commits_total: Count  # keys that were committed to slots which were not the writer's any more
    evictions_total: Count
    corrupt_total: Count
    expired_leases_total: Count
    expired_reservations_total: Count
    bad_frames_total: Count  # connections closed for garbage, oversize or a message out of place
    refused_total: dict[str, int]  # handshakes by reason, and reserved keys as no_room and too_long
    sent_blocks_total: Count  # to clients; see Fetch and Pull
    sent_bytes_total: Count
    failed_sends_total: Count  # blocks
    views: dict[str, dict[str, str]]  # by connected rank: the nodes that it cannot use, and why
    views_left_out: Count  # ranks whose view is not among them, to keep this message short


Answered = (
    Reserve
    | Commit
    | Grant
    | Locate
    | Hold
    | Renew
    | Fetch
    | StartStream
    | Pull
    | Store
    | Fill
    | Peek
    | ReadNotes
    | Statistics
)
Request = Answered | Release | Used | ReportCorrupt | Replicate | WriteNotes | View
Reply = (
    Reserved
    | Committed
    | Granted
    | Located
    | Held
    | Renewed
    | Fetched
    | Streaming
    | Pulled
    | Stored
    | Peeked
    | NotesRead
    | NodeStatistics
)
FromClient = Hello | Proof | Request
FromNode = Challenge | Refused | Welcome | Reply


def _check_keys(blob: bytes) -> int:
    count, rest = divmod(len(blob), KEY_BYTES)
    if rest:
        raise ValueError(f"{len(blob)} bytes are not whole keys of {KEY_BYTES}")
    if count > MAX_KEYS:
        raise ValueError(f"{count} keys, more than {MAX_KEYS}")
    return count


def _check_seconds(name: str, seconds: float) -> None:
    if not seconds > 0:  # NaN too
        raise ValueError(f"{name} is not above 0")


def _check_columns(count: int, *blobs: bytes) -> None:
    for blob in blobs:
        if len(blob) != 8 * count:
            raise ValueError(f"a column does not hold {count} numbers of 8 bytes")
