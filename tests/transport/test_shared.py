from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import Direction, Mapped, SharedHandle, attach, share
from tests.transport.conftest import MIB, checksum

pytestmark = pytest.mark.timeout(60)

AS_NOBODY = """
import os, sys
os.setgid(65534), os.setuid(65534)
fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 4096)
print(os.getpid(), fd, os.fstat(fd).st_ino, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memfd() -> Iterator[Callable[..., int]]:
    fds: list[int] = []

    def make(length: int, flags: int = os.MFD_ALLOW_SEALING) -> int:
        fds.append(os.memfd_create("test", flags | os.MFD_CLOEXEC))
        os.ftruncate(fds[-1], length)
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def bytes_of(mapped: Mapped) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * mapped.length).from_address(mapped.address), np.uint8)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_see_the_same_bytes(untouched_peer):
    peer = untouched_peer(None)
    mapped = attach(peer.shared, peer.base)
    assert (mapped.remote, mapped.length) == (peer.base, peer.length)
    assert np.array_equal(bytes_of(mapped).view(np.uint64), np.arange(peer.length // 8))
    mapped.close()
    mapped.close()


def test_a_handle_crosses_the_wire(memfd):
    handle = share(memfd(4096), 4096)
    packed = msgspec.msgpack.encode(handle)
    assert msgspec.msgpack.decode(packed, type=SharedHandle) == handle


def test_mappings_leave_nothing_open(untouched_peer):
    peer = untouched_peer(None)
    before = open_fds()
    for _ in range(20):
        attach(peer.shared, peer.base).close()
    assert open_fds() == before


def test_shared_memory_cannot_shrink_under_a_peer(memfd):
    fd = memfd(2 * 4096)
    share(fd, 2 * 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)


def test_what_could_shrink_is_not_shared(memfd, tmp_path):
    with pytest.raises(TransportError, match="MFD_ALLOW_SEALING"):
        share(memfd(4096, flags=0), 4096)
    with (tmp_path / "file").open("wb") as file, pytest.raises(TransportError, match="MFD_ALLOW_SEALING"):
        share(file.fileno(), 4096)
    with pytest.raises(TransportError, match="8192 bytes of a memfd of 4096"):
        share(memfd(4096), 8192)


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another"},
        {"pid_namespace": 1},
        {"inode": 1},
        {"length": 8192},
        {"length": 0},
        {"fd": 10**6},
    ],
    ids=str,
)
def test_a_peer_elsewhere_or_with_other_memory_is_not_mapped(memfd, change):
    handle = share(memfd(4096), 4096)
    before = open_fds()
    assert attach(msgspec.structs.replace(handle, **change), 0) is None
    assert open_fds() == before


def test_a_peer_that_is_gone_is_not_mapped(start_peer):
    peer = start_peer(MIB, None)
    peer.close()
    assert attach(peer.shared, peer.base) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_peer_of_another_user_is_not_mapped(memfd):
    other = subprocess.Popen(
        [sys.executable, "-c", AS_NOBODY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid, fd, inode = map(int, other.stdout.readline().split())
    own = share(memfd(4096), 4096)
    assert attach(msgspec.structs.replace(own, pid=pid, fd=fd, inode=inode), 0) is None
    other.communicate()


def test_only_sealed_memfds_are_mapped(memfd, tmp_path):
    """Whatever a handle names: a file, a pipe that would block, a memfd whose owner may shrink it."""
    own = share(memfd(4096), 4096)
    (tmp_path / "file").write_bytes(bytes(4096))
    os.mkfifo(tmp_path / "fifo")
    fds = [
        os.open(tmp_path / "file", os.O_RDWR),
        os.open(tmp_path / "fifo", os.O_RDWR),
        os.open("/dev/zero", os.O_RDWR),
        memfd(4096),
    ]
    for fd in fds:
        handle = msgspec.structs.replace(own, fd=fd, inode=os.fstat(fd).st_ino)
        assert attach(handle, 0) is None
    for fd in fds[:3]:
        os.close(fd)


@pytest.mark.parametrize("direction", Direction)
def test_a_block_outside_its_mapping_is_refused_with_its_batch(start_peer, make_client, direction):
    peer, client = start_peer(MIB, None), make_client(MIB, None)
    mapped = client.attach(peer)
    before = peer.digest(0, MIB)
    for address in (peer.base - 1, peer.base + MIB - 4095, 0, 2**64 - 1):
        blocks = client.blocks(8, 4096, peer)
        blocks.remote[5] = address
        with pytest.raises(TransportError, match=rf"block 5, .*{address:#x}, is outside its mapping"):
            client.transfer(direction, blocks, [mapped])
    assert not client.buffer.any()
    assert peer.digest(0, MIB) == before


def test_a_killed_peers_memory_can_still_be_read(start_peer, make_client):
    peer, client = start_peer(MIB, None), make_client(MIB, None)
    mapped = client.attach(peer)
    peer.kill()
    peer.process.wait()
    done = client.transfer(Direction.GET, client.blocks(16, 65536, peer), [mapped])
    assert not done.status.any()
    assert np.array_equal(client.buffer.view(np.uint64), np.arange(MIB // 8))


@pytest.mark.parametrize("direction", Direction)
def test_a_long_copy_ends_at_the_deadline(start_peer, make_client, direction):
    peer, client = start_peer(16 * MIB, None), make_client(16 * MIB, None)
    blocks = client.blocks(16384, MIB, peer)  # 16 GiB
    threads = len(os.listdir("/proc/self/task"))

    started_s = time.monotonic()
    done = client.transfer(direction, blocks, [client.attach(peer)], deadline_s=0.1)
    took_s = time.monotonic() - started_s

    assert took_s < 1.0
    copied = int((done.status == 0).sum())
    assert 0 < copied < 16384
    assert not done.status[:copied].any()
    assert (done.status[copied:] == -20).all()
    first = client.buffer[:MIB].tobytes()
    assert done.checksums[0] == checksum(first)
    assert client.worker.statistics().failed_blocks == 16384 - copied
    assert len(os.listdir("/proc/self/task")) == threads


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("size", [MIB + 4096 + 24, 24 * MIB])
def test_what_two_threads_copy_is_right(memfd, make_client, direction, size):
    count = 24 * MIB // size
    length = size * count
    fd = memfd(length)
    theirs = np.frombuffer(mmap.mmap(fd, length), np.uint8)
    mapped = attach(share(fd, length), theirs.ctypes.data)
    client = make_client(length, None)
    there, here = theirs[:length], client.buffer[:length]
    there[:], here[:] = np.random.default_rng(1).integers(0, 256, (2, length), np.uint8)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(size)

    done = client.worker.transfer(
        direction,
        [mapped],
        np.zeros(count, np.uint32),
        offsets + np.uint64(mapped.remote),
        (offsets + np.uint64(client.memory.address))[:, None],
        size,
        [client.memory],
        deadline_s=10,
    )

    assert not done.status.any()
    assert np.array_equal(there, here)
    assert done.checksums.tolist() == [checksum(block.tobytes()) for block in here.reshape(count, size)]
    mapped.close()


def test_a_frozen_node_does_not_keep_mapped_blocks_from_arriving(start_peer, make_client):
    frozen, shared = start_peer(16 * MIB, "tcp"), start_peer(16 * MIB, "tcp")
    client = make_client(16 * MIB, "tcp")
    key = client.connect(frozen)
    assert not client.transfer(Direction.GET, client.blocks(1, 4096, frozen), [key]).status.any()
    frozen.freeze()
    blocks = client.blocks(256, 65536, frozen, shared)

    done = client.transfer(Direction.GET, blocks, [key, client.attach(shared)], deadline_s=0.5)

    assert (done.status[blocks.route == 0] == -20).all()
    assert not done.status[blocks.route == 1].any()


def test_a_checksum_is_of_the_bytes_that_arrived_even_if_the_peer_changes_them(memfd, make_client):
    length = 4 * MIB
    fd = memfd(length)
    written = np.frombuffer(mmap.mmap(fd, length), np.uint8)
    client = make_client(length, None)
    mapped = attach(share(fd, length), written.ctypes.data)
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            written.fill(value)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        for _ in range(20):
            done = client.worker.transfer(
                Direction.GET,
                [mapped],
                np.zeros(64, np.uint32),
                np.arange(64, dtype=np.uint64) * np.uint64(length // 64) + np.uint64(mapped.remote),
                (np.arange(64, dtype=np.uint64) * np.uint64(length // 64))[:, None]
                + np.uint64(client.memory.address),
                length // 64,
                [client.memory],
                deadline_s=10,
            )
            arrived = client.buffer.reshape(64, -1)
            assert done.checksums.tolist() == [checksum(block.tobytes()) for block in arrived]
    finally:
        stop.set()
        scribbler.join()
    mapped.close()
