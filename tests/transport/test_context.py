from __future__ import annotations

import numpy as np
import pytest

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import Context, Worker, load_library

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("tls", ["cma", "self,posix", "^tcp", "all-but", ""])
def test_transports_without_tcp_are_refused(tls):
    with pytest.raises(TransportError, match="tcp"):
        Context(load_library(), tls=tls)


@pytest.mark.parametrize("tls", [None, "tcp", "all", "tcp,cma", "^cma"])
def test_transports_with_tcp_are_accepted(tls):
    context = Context(load_library(), tls=tls)
    assert Worker(context).address
    context.close()


@pytest.mark.parametrize(
    ("tls", "shares"),
    [("tcp", False), ("tcp,cma", False), ("^posix", False), ("tcp,shm", True), ("all", True), ("^cma", True)],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_memory_is_shared_if_the_transports_have_shared_memory(monkeypatch, tls, shares, by_variable):
    if by_variable:
        monkeypatch.setenv("UCX_TLS", tls)
    context = Context(load_library(), tls=None if by_variable else tls)
    assert context.shares_memory == shares
    context.close()


def test_one_packed_key_covers_one_registration():
    context = Context(load_library())
    memory = np.zeros(1 << 20, np.uint8)
    first = context.register(memory.ctypes.data, 1 << 19)
    second = context.register(memory.ctypes.data + (1 << 19), 1 << 19)
    assert first.packed_rkey()
    assert (first.address, first.length) == (memory.ctypes.data, 1 << 19)
    first.close()
    first.close()
    assert second.packed_rkey()
    context.close()


def test_close_ends_workers_and_memories_and_may_be_repeated():
    context = Context(load_library())
    worker = Worker(context)
    memory = np.zeros(4096, np.uint8)
    registered = context.register(memory.ctypes.data, 4096)
    context.close()
    context.close()
    registered.close()
    with pytest.raises(TransportError, match="closed"):
        worker.serve(0)
