"""What a memory node answers from its index and its notes alone, without moving blocks."""

from __future__ import annotations

from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.transport.columns import pack_u64, split_keys, unpack_u64
from polarkv_sglang.transport.framing import BadFrame
from polarkv_sglang.transport.messages import (
    Commit,
    Committed,
    FromClient,
    Held,
    Hold,
    Locate,
    Located,
    Message,
    NotesRead,
    Peek,
    Peeked,
    ReadNotes,
    Release,
    Renew,
    Renewed,
    ReportCorrupt,
    Reserve,
    Reserved,
    WriteNotes,
)


def answer(index: Index, notes: Notes, owner: int, request: FromClient) -> Message | None:
    """The reply to a client's request, None if it wants none; leases and reservations become ``owner``'s.

    Raises BadFrame for what is no such request, or cannot be meant.
    """
    match request:
        case Locate():
            lease = index.locate(owner, split_keys(request.keys), request.lease_s)
            columns = (lease.addresses, lease.lengths, lease.checksums, lease.generations)
            return Located(request.request_id, lease.number, *map(pack_u64, columns))
        case Hold():
            hold = index.hold(owner, split_keys(request.keys), request.lease_s)
            return Held(request.request_id, hold.number, hold.present)
        case Renew():
            return Renewed(request.request_id, index.renew(owner, request.lease, request.lease_s))
        case Release():
            index.release(owner, request.lease)
        case Peek():
            return Peeked(request.request_id, index.peek(split_keys(request.keys)))
        case Reserve():
            keys, parents = split_keys(request.keys), split_keys(request.parents)
            reservation = index.reserve(owner, keys, parents, request.length)
            addresses = pack_u64(reservation.addresses)
            return Reserved(request.request_id, reservation.number, addresses, reservation.states)
        case Commit():
            checksums = unpack_u64(request.checksum_blob).tolist()
            try:
                count = index.commit(owner, request.reservation, request.mask, checksums)
            except ValueError as error:
                raise BadFrame(str(error)) from error
            return Committed(request.request_id, count)
        case ReportCorrupt():
            index.report_corrupt(split_keys(request.keys), unpack_u64(request.generation_blob).tolist())
        case WriteNotes():
            notes.write(split_keys(request.keys), request.notes)
        case ReadNotes():
            return NotesRead(request.request_id, notes.read(split_keys(request.keys)))
        case _:
            raise BadFrame(f"{type(request).__name__} after authentication")
    return None
