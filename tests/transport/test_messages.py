from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.transport import messages as m
from polarkv_sglang.transport.columns import pack_u64, seal, split_keys, unpack_u64
from polarkv_sglang.transport.framing import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    BadFrame,
    FrameReader,
    decode_from_client,
    decode_from_node,
    encode_before,
    encode_frame,
    prove,
)
from polarkv_sglang.transport.shared import SharedHandle

KEYS = bytes(range(48))
U64 = pack_u64([1, 2, 2**64 - 1])
FROM_CLIENT = [
    m.Hello(1, "rank", "engine", bytes(16)),
    m.Proof(bytes(32)),
    m.Reserve(1, KEYS, bytes(48), 4096),
    m.Commit(2, 3, b"\1\0\1", U64),
    m.Locate(3, KEYS, 1.5),
    m.Release(4),
    m.ReportCorrupt(KEYS, U64),
    m.Peek(5, KEYS),
    m.Hold(5, KEYS, 1.5),
    m.Pull(5, KEYS, 4096, pack_u64([0, 512, 2048, 512])),
    m.Renew(6, 4, 1.5),
    m.Fetch(
        7, KEYS, 1.0, b"worker", [b"one", b"two"], seal(b"worker", [b"one", b"two"]),
        2, 2048, pack_u64(range(6)), pack_u64([0, 1, 0, 1, 0, 1]),
    ),
    m.Pull(9, KEYS, 4096),
    m.StartStream(9),
    m.Store(10, KEYS, bytes(48), 4096),
    m.Fill(11, 12),
    m.Replicate(KEYS, "10.0.0.5:7411"),
    m.WriteNotes(KEYS, [b"one", b"two", b"three"]),
    m.ReadNotes(8, KEYS),
    m.View({"10.0.0.4:7411": "Connection refused"}),
    m.Statistics(8),
]  # fmt: skip
FROM_NODE = [
    m.Challenge(1, bytes(16), True),
    m.Refused("because"),
    m.Welcome(bytes(16), b"worker", b"rkey", 2**63, 2**40, 2**26),
    m.Welcome(bytes(16), b"worker", b"rkey", 0, 1, 1, SharedHandle(7, 3, 2**40, 2**40, "boot", 2**32)),
    m.Reserved(1, 2, U64, b"\0\1\2"),
    m.Committed(2, 3),
    m.Located(3, 4, U64, U64, U64, U64),
    m.Streaming(9, True),
    m.Peeked(5, b"\1\0\1"),
    m.Held(5, 4, b"\1\0\1"),
    m.Renewed(6, True),
    m.Fetched(7, b"\0\1\2", U64, U64),
    m.Pulled(9, U64, U64),
    m.Stored(10, b"\0\1\3"),
    m.NotesRead(8, [b"one", b"", b"three"]),
]


def fetch(**changed: object) -> list[object]:
    """The fields of a valid Fetch of three blocks in two pieces, but for what is changed."""
    fields = {
        "request_id": 1,
        "keys": KEYS,
        "timeout_s": 1.0,
        "worker_address": b"worker",
        "rkeys": [b"key"],
        "seal": seal(b"worker", [b"key"]),
        "pieces": 2,
        "piece_bytes": 2048,
        "target_blob": bytes(48),
        "region_blob": bytes(48),
    }
    return ["fetch", *(fields | changed).values()]


@pytest.mark.parametrize("message", FROM_CLIENT, ids=lambda message: type(message).__name__)
def test_every_message_of_a_client_survives_the_wire(message: m.FromClient):
    assert decode_from_client(bytes(encode_frame(message)[HEADER_BYTES:])) == message


@pytest.mark.parametrize("message", FROM_NODE, ids=lambda message: type(message).__name__)
def test_every_message_of_a_node_survives_the_wire(message: m.FromNode):
    assert decode_from_node(bytes(encode_frame(message)[HEADER_BYTES:])) == message


@pytest.mark.parametrize("message", FROM_NODE, ids=lambda message: type(message).__name__)
def test_message_in_the_wrong_direction_is_a_bad_frame(message: m.FromNode):
    with pytest.raises(BadFrame):
        decode_from_client(bytes(encode_frame(message)[HEADER_BYTES:]))


def test_pull_of_many_keys_in_many_parts_is_refused():
    """The node would hold up all others for it."""
    parts = pack_u64([0, 1] * 2)
    m.Pull(1, bytes(16 * m.MAX_KEYS), 4096, parts)
    with pytest.raises(ValueError, match="runs"):
        m.Pull(1, bytes(16 * m.MAX_KEYS), 4096, pack_u64([0, 1] * 3))


@given(st.binary(max_size=200))
def test_garbage_is_a_bad_frame_or_a_message_and_nothing_else(data: bytes):
    for decode in (decode_from_client, decode_from_node):
        try:
            decode(data)
        except BadFrame:
            pass


@given(st.sampled_from(FROM_CLIENT), st.integers(0, 60), st.integers(0, 255))
def test_one_changed_byte_is_a_bad_frame_or_a_message_and_nothing_else(message, position: int, byte: int):
    frame = encode_frame(message)[HEADER_BYTES:]
    frame[position % len(frame)] = byte
    try:
        decode_from_client(bytes(frame))
    except BadFrame:
        pass


@given(st.lists(st.sampled_from(FROM_CLIENT), max_size=6), st.lists(st.integers(1, 40)))
def test_frames_are_the_same_however_the_stream_is_cut(sent, cuts: list[int]):
    stream = b"".join(encode_frame(message) for message in sent)
    reader = FrameReader(MAX_FRAME_BYTES)
    received = []
    for size in [*cuts, len(stream)]:
        reader.feed(stream[:size])
        stream = stream[size:]
        while (frame := reader.next_frame()) is not None:
            received.append(decode_from_client(frame))
    assert received == sent


def test_frame_over_the_limit_is_refused_from_its_header():
    reader = FrameReader(100)
    reader.feed((101).to_bytes(4, "little"))
    with pytest.raises(BadFrame, match="101 bytes is over the limit of 100"):
        reader.next_frame()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (["locate", 1, bytes(17), 1.0], "whole keys"),
        (["locate", 1, bytes(16 * (m.MAX_KEYS + 1)), 1.0], "more than 8192"),
        (["locate", 1, KEYS, float("nan")], "above 0"),
        (["locate", -1, KEYS, 1.0], ">= 0"),
        (["locate", 1, KEYS, 1.0, "more"], "length"),
        (["reserve", 1, KEYS, bytes(16), 4096], "differ"),
        (["reserve", 1, KEYS, KEYS, 0], ">= 1"),
        (["commit", 1, 1, b"\1", b""], "column"),
        (["report_corrupt", KEYS, bytes(8)], "column"),
        (["renew", 1, 4, 0.0], "above 0"),
        (["replicate", bytes(17), "10.0.0.5:7411"], "whole keys"),
        (["view", {f"node {number}": "out" for number in range(m.MAX_VIEW_NODES + 1)}], "<= 1024"),
        (["view", {"10.0.0.4:7411": "x" * 513}], "<= 512"),
        (fetch(timeout_s=-1.0), "above 0"),
        (fetch(target_blob=bytes(8)), "column"),
        (fetch(region_blob=pack_u64([0, 1] * 3)), "not among the 1 rkeys"),
        (["pull", 1, KEYS, 4096, pack_u64([0, 4097])], "leaves its block"),
        (["pull", 1, KEYS, 4096, pack_u64([4096, 1])], "leaves its block"),
        (["pull", 1, KEYS, 4096, pack_u64([2**64 - 1, 2])], "leaves its block"),
        (["pull", 1, KEYS, 4096, pack_u64([0, 0])], "empty"),
        (["pull", 1, KEYS, 4096, pack_u64([0])], "no pairs"),
        (["pull", 1, KEYS, 4096, pack_u64([0, 1] * 65)], "more than 64"),
        (["hold", 1, KEYS, 0.0], "above 0"),
        (fetch(rkeys=[]), ">= 1"),
        (fetch(rkeys=[b"key"] * 65), "<= 64"),
        (fetch(rkeys=[b"other"]), "seal"),
        (fetch(worker_address=b"worke"), "seal"),
        (fetch(pieces=2**17), "ask for fewer keys"),
        (["hello", 1, "queen", "engine", bytes(16)], "queen"),
        (["steal", 1], "steal"),
    ],
)
def test_message_that_is_not_valid_is_refused_by_what_is_wrong(fields: list[object], complaint: str):
    with pytest.raises(BadFrame, match=complaint):
        decode_from_client(msgspec.msgpack.encode(fields))


def test_hello_of_a_later_version_can_be_read():
    later = msgspec.msgpack.encode(["hello", 9, "rank", "engine", bytes(16), {"new": True}])
    hello = decode_from_client(later)
    assert isinstance(hello, m.Hello)
    assert hello.protocol_version == 9


def test_numbers_and_keys_come_back_from_their_blobs():
    assert unpack_u64(U64).tolist() == [1, 2, 2**64 - 1]
    assert unpack_u64(U64).dtype == np.uint64
    assert split_keys(KEYS) == [KEYS[:16], KEYS[16:32], KEYS[32:]]


def test_proof_depends_on_the_token_and_on_both_nonces():
    macs = {
        prove(token, a, b)
        for token in ("x", "y")
        for a in (b"1" * 16, b"2" * 16)
        for b in (b"3" * 16, b"4" * 16)
    }
    assert len(macs) == 8


def test_seal_depends_on_every_byte_and_on_where_the_parts_end():
    parts = [
        (b"ab", [b"c"]),
        (b"a", [b"bc"]),
        (b"abc", []),
        (b"abc", [b""]),
        (b"ab", [b"d"]),
        (b"ac", [b"c"]),
    ]
    assert len({seal(address, rkeys) for address, rkeys in parts}) == len(parts)


@pytest.mark.parametrize("between", [0, 8])
@pytest.mark.parametrize(
    "message",
    [m.Pulled(1, U64, U64), m.Store(10, KEYS, bytes(48), 4096), m.Fill(11, 12)],
    ids=["pulled", "store", "fill"],
)
def test_bytes_never_go_out_where_a_processor_copies_them_slowly(message: m.Message, between: int):
    plain = len(encode_frame(message)) + between
    padded = 0
    for address in range(4096, 3 * 4096):
        frame = encode_before(message, address, between)
        assert (len(frame) + between - address) % 4096 >= 64
        padded += len(frame) + between > plain
        decode = decode_from_node if isinstance(message, m.Pulled) else decode_from_client
        assert msgspec.structs.replace(decode(bytes(frame[4:])), padding=b"") == message
    assert padded == 2 * 64, "padding where it is of no use"
