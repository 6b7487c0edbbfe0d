"""What a memory node answers from its index and its notes alone, without moving blocks."""

from __future__ import annotations

from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.transport.columns import split_keys
from polarkv_sglang.transport.framing import BadFrame
from polarkv_sglang.transport.messages import (
    Commit,
    Committed,
    Fill,
    FromClient,
    Grant,
    Granted,
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
    Used,
    WriteNotes,
)


def answer(index: Index, notes: Notes, owner: int, request: FromClient) -> Message | None:
    """The reply to a client's request, None if it wants none; leases and reservations become ``owner``'s.

    Raises BadFrame for what is no such request, or cannot be meant.
    """
    match request:
        case Locate():
            return Located(request.request_id, *index.locate(owner, request.keys, request.lease_s))
        case Hold():
            return Held(request.request_id, *index.hold(owner, request.keys, request.lease_s))
        case Renew():
            return Renewed(request.request_id, index.renew(owner, request.lease, request.lease_s))
        case Release():
            index.release(owner, request.lease)
        case Used():
            index.use(request.keys)
        case Peek():
            return Peeked(request.request_id, index.peek(request.keys))
        case Reserve():
            reservation = index.reserve(owner, request.keys, request.parents, request.length)
            return Reserved(request.request_id, *reservation)
        case Grant():
            return Granted(request.request_id, index.grant(owner, request.length, request.slots))
        case Commit():
            try:
                count = index.commit(owner, request.reservation, request.mask, request.checksum_blob)
            except ValueError as error:
                raise BadFrame(str(error)) from error
            return Committed(request.request_id, count)
        case ReportCorrupt():
            index.report_corrupt(request.keys, request.generation_blob)
        case WriteNotes():
            notes.write(split_keys(request.keys), request.notes)
        case ReadNotes():
            return NotesRead(request.request_id, notes.read(split_keys(request.keys)))
        case Fill():
            raise BadFrame("a fill of a reservation that is over, or is another's")
        case _:
            raise BadFrame(f"{type(request).__name__} out of place")
    return None
