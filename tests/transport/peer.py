"""A memory node reduced to its transport: shares and serves a memory, obeys one-line commands on stdin.

Prints one JSON line when ready: address and rkey (hex), base (address of the memory), shared (its handle).
Answers each command with one line: "digest OFFSET LENGTH" with the bytes' xxh3 in hex; "push ADDRESS RKEY
REMOTE LENGTH" with the status of a put of its first bytes to a peer. The end of input stops it; it prints how
many seconds that took.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time

import msgspec
import numpy as np
import xxhash

from polarkv_sglang.transport import Context, Direction, RegisteredMemory, Worker, load_library, share


def push(memory: RegisteredMemory, address: str, rkey: str, remote: str, length: str) -> int:
    worker = Worker(memory.context)
    key = worker.connect(bytes.fromhex(address)).unpack(bytes.fromhex(rkey))
    done = worker.transfer(
        Direction.PUT,
        [key],
        np.zeros(1, np.uint32),
        np.array([int(remote)], np.uint64),
        np.array([[memory.address]], np.uint64),
        int(length),
        [memory],
        deadline_s=10,
    )
    worker.close()
    return int(done.status[0])


def main() -> None:
    length = int(sys.argv[1])
    fd = os.memfd_create("peer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    memory = np.frombuffer(mmap.mmap(fd, length), np.uint8)
    memory[:] = np.arange(length // 8, dtype=np.uint64).view(np.uint8)  # no two words alike
    context = Context(load_library())
    registered = context.register(memory.ctypes.data, length)
    worker = Worker(context)
    ready = {
        "address": worker.address.hex(),
        "rkey": registered.packed_rkey().hex(),
        "base": registered.address,
        "shared": msgspec.to_builtins(share(fd, length)),
    }
    stop_fd = os.eventfd(0)
    server = threading.Thread(target=worker.serve, args=(stop_fd,))
    server.start()
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "digest":
            offset, size = map(int, arguments)
            print(xxhash.xxh3_64_hexdigest(memory[offset : offset + size]), flush=True)
        else:
            print(push(registered, *arguments), flush=True)
    started_s = time.monotonic()
    os.eventfd_write(stop_fd, 1)
    server.join()
    context.close()
    print(json.dumps({"stop_s": time.monotonic() - started_s}), flush=True)


if __name__ == "__main__":
    main()
