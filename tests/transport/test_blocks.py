"""The checksum of a block, and what merging may not change."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import Direction, checksums, load_library
from polarkv_sglang.transport import worker as worker_module
from tests.transport.conftest import MIB, Client, Peer, checksum

pytestmark = pytest.mark.timeout(120)

AREA = MIB  # bytes of the peer and of the client that a layout may use
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Layout(NamedTuple):
    """Places are counted in pieces (local) and blocks (remote)."""

    piece_bytes: int
    local: np.ndarray  # [blocks, pieces]
    remote: np.ndarray  # [blocks]
    route: np.ndarray  # [blocks]
    operation_bytes: int
    entries: int
    entry_bytes: int


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    piece_bytes = draw(st.sampled_from([1, 7, 64, 1000, 4096, 4100, 6000, 65536]))
    blocks, pieces = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    local_places = min(AREA // piece_bytes, 4 * blocks * pieces)
    if local_places < blocks * pieces or blocks * pieces * piece_bytes > AREA:
        blocks, pieces = 4, 3
        local_places = 16
    # In order, so that neighbours may merge; or anywhere.
    places = draw(st.permutations(range(local_places)))[: blocks * pieces]
    local = sorted(places) if draw(st.booleans()) else places
    remote = draw(st.permutations(range(min(AREA // (pieces * piece_bytes), 2 * blocks))))[:blocks]
    return Layout(
        piece_bytes,
        np.array(local, np.uint64).reshape(blocks, pieces),
        np.array(sorted(remote) if draw(st.booleans()) else remote, np.uint64),
        np.array(draw(st.lists(st.integers(0, 1), min_size=blocks, max_size=blocks)), np.uint32),
        draw(st.sampled_from([piece_bytes // 3 + 1, 5000, 8192, MIB])),
        draw(st.sampled_from([1, 2, 256])),
        draw(st.sampled_from([64, MIB])),
    )


@pytest.fixture(scope="module", params=[None, "tcp"], ids=["default", "tcp"])
def pair(request: pytest.FixtureRequest):
    """A client with a UCX and a mapped route to one peer, and a view of the peer's bytes."""
    peer, client = Peer(AREA, request.param), Client(AREA, request.param)
    key, mapped = client.connect(peer), client.attach(peer)
    view = np.frombuffer((ctypes.c_ubyte * AREA).from_address(mapped.address), np.uint8)
    yield client, (key, mapped), peer.base, view
    client.close()
    peer.close()


@SETTINGS
@given(layout=layouts(), direction=st.sampled_from(Direction))
def test_however_blocks_lie_and_merge_every_byte_finds_its_place(pair, layout, direction):
    client, routes, base, peers_bytes = pair
    size = layout.local.shape[1] * layout.piece_bytes
    random = np.random.default_rng(0)
    client.buffer[:], peers_bytes[:] = (random.integers(0, 256, AREA, np.uint8) for _ in range(2))
    expected_here, expected_there = client.buffer.copy(), peers_bytes.copy()
    moved = []
    for pieces, remote in zip(layout.local.tolist(), layout.remote.tolist()):
        there = expected_there[remote * size :][:size]
        parts = [expected_here[place * layout.piece_bytes :][: layout.piece_bytes] for place in pieces]
        if direction is Direction.GET:
            for index, part in enumerate(parts):
                part[:] = there[index * layout.piece_bytes :][: layout.piece_bytes]
        else:
            there[:] = np.concatenate(parts)
        moved.append(there.tobytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "OPERATION_BYTES", layout.operation_bytes)
        patch.setattr(worker_module, "IOV_ENTRIES", layout.entries)
        patch.setattr(worker_module, "IOV_ENTRY_BYTES", layout.entry_bytes)
        done = client.worker.transfer(
            direction,
            routes,
            layout.route,
            base + layout.remote * np.uint64(size),
            client.memory.address + layout.local * np.uint64(layout.piece_bytes),
            layout.piece_bytes,
            [client.memory],
            deadline_s=20,
        )

    assert not done.status.any()
    assert np.array_equal(client.buffer, expected_here)
    assert np.array_equal(peers_bytes, expected_there)
    assert done.checksums.tolist() == [checksum(block) for block in moved]


@pytest.mark.parametrize("direction", Direction)
def test_what_goes_on_in_the_peer_is_moved_together(start_peer, make_client, tls, direction):
    peer, client = start_peer(4 * MIB, tls), make_client(4 * MIB, tls)
    key = client.connect(peer)
    adjacent = client.blocks(512, 4096, peer)
    scattered = client.blocks(512, 4096, peer)
    scattered.local[:] = np.random.default_rng(0).permutation(scattered.local)
    elsewhere = client.blocks(512, 4096, peer)
    elsewhere.remote[:] = elsewhere.remote[::-1].copy()

    operations = []
    for blocks in (adjacent, scattered, elsewhere):
        before = client.worker.statistics().operations
        assert not client.transfer(direction, blocks, [key]).status.any()
        operations.append(client.worker.statistics().operations - before)

    assert operations == [4, 4, 512]  # of 512 KiB; of 128 entries, which is 512 KiB too; of one block


def test_merged_blocks_fail_with_their_operation_only(start_peer, make_client):
    live, frozen = start_peer(MIB, "tcp"), start_peer(MIB, "tcp")
    client = make_client(MIB, "tcp")
    keys = [client.connect(live), client.connect(frozen)]
    assert not client.transfer(Direction.GET, client.blocks(2, 4096, live, frozen), keys).status.any()
    frozen.freeze()
    blocks = client.blocks(128, 4096, live)
    blocks.route[64:] = 1
    blocks.remote[64:] += np.uint64(frozen.base) - np.uint64(live.base)

    done = client.transfer(Direction.GET, blocks, keys, deadline_s=0.5)

    assert not done.status[:64].any()
    assert (done.status[64:] == -20).all()


@pytest.mark.parametrize("piece_bytes", [1, 8, 1000, 4095, 4096, 4097, 8192, 12345, 100_003])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_checksums_are_of_chunks_not_of_pieces(piece_bytes, pieces):
    data = np.random.default_rng(0).integers(0, 256, 3 * pieces * piece_bytes, np.uint8)
    places = np.random.default_rng(1).permutation(3 * pieces)
    local = (data.ctypes.data + places * piece_bytes).astype(np.uint64).reshape(3, pieces)

    sums = checksums(load_library(), local, piece_bytes)

    cut = data.reshape(3 * pieces, piece_bytes)
    assert sums.dtype == np.uint64
    assert sums.tolist() == [checksum(cut[block].tobytes()) for block in places.reshape(3, pieces)]


def test_checksums_of_no_blocks_are_none():
    assert checksums(load_library(), np.empty((0, 4), np.uint64), 4096).shape == (0,)
    with pytest.raises(TransportError, match="no blocks"):
        checksums(load_library(), np.empty((4, 0), np.uint64), 4096)
