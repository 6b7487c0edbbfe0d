"""Notes: small values beside the blocks, within their own limit, on the node that their key has."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.pool.notes import Notes, notes_bytes
from polarkv_sglang.transport.framing import HEADER_BYTES, MAX_FRAME_BYTES, encode_frame
from polarkv_sglang.transport.messages import MAX_NOTE_BYTES, MAX_NOTES, NotesRead, WriteNotes
from tests.pool.rank import a_rank
from tests.pool.test_node import eventually
from tests.support import running_node, running_nodes

KEYS = [hashlib.sha256(bytes([number])).digest()[:16] for number in range(8)]


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.binary(min_size=1, max_size=600)), max_size=60))
def test_notes_never_take_more_than_they_may(written: list[tuple[bytes, bytes]]) -> None:
    notes, last = Notes(2000), {}
    for key, note in written:
        notes.write([key], [note])
        last[key] = note
        assert notes.used_bytes <= 2000
        assert notes.read([key]) == [note]
    found = notes.read(KEYS)
    assert all(note in (b"", last.get(key)) for key, note in zip(KEYS, found))
    assert notes.used_bytes == sum(256 + len(note) for note in found if note)
    assert len(notes) == sum(map(bool, found))


def test_the_note_that_was_not_used_for_longest_goes_first() -> None:
    notes = Notes(3 * 300)
    notes.write(KEYS[:3], [b"x" * 44] * 3)
    notes.read(KEYS[:1])
    notes.write(KEYS[3:4], [b"x" * 44])
    assert [bool(note) for note in notes.read(KEYS[:4])] == [True, False, True, True]


def test_notes_have_a_small_part_of_a_node() -> None:
    assert notes_bytes(64 << 20) == 1 << 20
    assert notes_bytes(1 << 40) == 64 << 20


def test_as_many_and_as_long_notes_as_one_request_may_have_fit_a_frame() -> None:
    notes = [bytes(MAX_NOTE_BYTES - 1) + b"x"] * MAX_NOTES
    for message in (WriteNotes(bytes(16 * MAX_NOTES), notes), NotesRead(1, notes)):
        assert len(encode_frame(message)) - HEADER_BYTES <= MAX_FRAME_BYTES


def test_what_one_rank_notes_another_reads_and_the_last_one_counts() -> None:
    keys = [hashlib.sha256(f"note {number}".encode()).digest()[:16] for number in range(MAX_NOTES)]
    with (
        running_nodes(2) as (one, other),
        a_rank(one.address, other.address) as writer,
        a_rank(one.address, other.address) as reader,
    ):
        assert reader.client.read_notes(keys) == [b""] * MAX_NOTES
        writer.client.write_notes(dict.fromkeys(keys, b"old"))
        new = {key: key * 32 for key in keys}
        writer.client.write_notes(new)
        eventually(lambda: reader.client.read_notes(keys) == list(new.values()))
        assert not reader.client.statistics().failed_batches
        other.kill()
        left = reader.client.read_notes(keys)
        assert 0 < sum(map(bool, left)) < MAX_NOTES
        assert all(note in (b"", new[key]) for key, note in zip(keys, left))


def test_a_node_is_not_blamed_for_a_wait_for_other_calls() -> None:
    with running_node() as node, a_rank(node.address, deadline_s=2.0) as rank:
        rank.client.write_notes({KEYS[0]: b"note"})
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.extend(rank.client.read_notes(KEYS[:1])))
        with rank.client._peek_lane.lock:
            reading.start()
            time.sleep(1.5)
            node.freeze()
        time.sleep(1)
        os.kill(node.pid, signal.SIGCONT)
        reading.join()
        assert found == [b"note"]
        assert not rank.client.statistics().failed_batches
