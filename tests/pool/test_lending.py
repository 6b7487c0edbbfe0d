"""Large writes lend their pages to the socket: no byte of another write, and none lost where it refuses."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import load_library
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import Store
from polarkv_sglang.transport.stream import Answer, Call, Exchange
from tests.pool.streams import BLOCK, PIECE, Memory, call, keys, pull, streaming
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node


def test_large_writes_to_two_nodes_go_at_once(control: ControlConnection):
    under, sources = keys(400), (Memory(400), Memory(400, seed=2))
    with running_node("64MiB", "--ucx-tls", "tcp") as node, streaming(node) as other:
        calls = [
            Call(each, Store(each.next_id(), under, NO_PARENT + under[:-16], BLOCK), source.addresses)
            for each, source in zip((control, other), sources)
        ]
        answers = Exchange(load_library()).run(calls, PIECE, time.monotonic() + 5.0)
        assert all(isinstance(answer, Answer) for answer in answers), answers
        for each, source in zip((control, other), sources):
            target = Memory(400, seed=1)
            pull(each, target, under)
            assert (target.blocks() == source.blocks()).all()


# Refuses the call of the name and number in REFUSE, and leaves how many calls there were in the file CALLS.
_REFUSING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

static int calls;

static int refuses(const char *name) {
    const char *which = getenv("REFUSE"), *number = strchr(which, ' ');
    if (strncmp(which, name, number - which) || ++calls != atoi(number)) return 0;
    errno = EPERM;
    return 1;
}

ssize_t vmsplice(int fd, const struct iovec *ranges, size_t count, unsigned flags) {
    ssize_t (*real)(int, const struct iovec *, size_t, unsigned) = dlsym(RTLD_NEXT, "vmsplice");
    return refuses("vmsplice") ? -1 : real(fd, ranges, count, flags);
}

ssize_t splice(int in, off_t *from, int out, off_t *to, size_t length, unsigned flags) {
    ssize_t (*real)(int, off_t *, int, off_t *, size_t, unsigned) = dlsym(RTLD_NEXT, "splice");
    return refuses("splice") ? -1 : real(in, from, out, to, length, flags);
}

__attribute__((destructor)) static void tell(void) {
    FILE *file = calls ? fopen(getenv("CALLS"), "w") : NULL;
    if (file) fprintf(file, "%d", calls), fclose(file);
}
"""


@pytest.mark.parametrize("refused", ["vmsplice 2", "splice 5", "splice 0"])
def test_what_the_kernel_does_not_lend_is_copied(tmp_path: Path, refused: str):
    """In a process of its own, which has these calls refused; the last one never: then all is lent."""
    source, library, calls = tmp_path / "refusing.c", tmp_path / "refusing.so", tmp_path / "calls"
    source.write_text(_REFUSING, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "REFUSE": refused, "CALLS": str(calls)}
    inner = f"{Path(__file__).with_name('test_stream.py')}::test_blocks_come_back_as_they_were_stored[400]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", inner]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    number = int(refused.split()[1])
    assert int(calls.read_text()) == number or number == 0


def pump(source: socket.socket, sink: socket.socket, most: int, over: threading.Event) -> None:
    """Pass bytes on, and once it was ``most`` only when the time is ``over``."""
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(64 << 10):
            sink.sendall(data)
            passed += len(data)
            if passed >= most:
                over.wait()
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def stalling_way(node: RunningNode, most: int, over: threading.Event) -> Iterator[str]:
    """An address that leads one client to a node; what is behind its first ``most`` bytes has to wait."""
    host, port = node.address.rsplit(":", 1)
    with socket.socket() as listener, socket.create_connection((host, int(port))) as there:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        listener.bind((host, 0))
        listener.listen()

        def lead() -> None:
            here, _ = listener.accept()
            with here:
                back = threading.Thread(target=pump, args=(there, here, sys.maxsize, over))
                back.start()
                pump(here, there, most, over)
                back.join()

        way = threading.Thread(target=lead)
        way.start()
        try:
            yield f"{host}:{listener.getsockname()[1]}"
        finally:
            over.set()
            way.join()


def test_memory_that_is_used_again_after_a_write_failed_is_in_no_block(node: RunningNode):
    """When the time is over the last pages and their checksums are in the socket yet."""
    source, under, over = Memory(400), keys(400), threading.Event()
    with (
        stalling_way(node, 400 * BLOCK - (1 << 20), over) as address,
        ControlConnection.connect(address, token=None, role="rank", client="test", deadline_s=5.0) as control,
    ):
        control.start_streaming(5.0)
        request = Store(control.next_id(), under, NO_PARENT + under[:-16], BLOCK)
        answer = call(control, request, source, deadline_s=1.0)
        source.bytes[:] = 0
        over.set()
    assert isinstance(answer, NodeError)
    eventually(lambda: (node.statistics().connections, node.statistics().reservations) == (1, 0))
    assert node.statistics().blocks == 0
