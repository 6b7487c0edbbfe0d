"""A memory node reduced to its transport: registers memory, serves it, obeys one-line commands on stdin.

Prints one JSON line when ready: address and rkey (hex), base (address of the memory). The command "digest
OFFSET LENGTH" prints the bytes' xxh3 in hex. The end of input stops it; it prints how many seconds that took.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import numpy as np
import xxhash

from polarkv_sglang.transport import Context, Worker, load_library


def main() -> None:
    length = int(sys.argv[1])
    memory = np.arange(length // 8, dtype=np.uint64).view(np.uint8)  # no two words alike
    context = Context(load_library())
    registered = context.register(memory.ctypes.data, length)
    worker = Worker(context)
    ready = {
        "address": worker.address.hex(),
        "rkey": registered.packed_rkey().hex(),
        "base": registered.address,
    }
    stop_fd = os.eventfd(0)
    server = threading.Thread(target=worker.serve, args=(stop_fd,))
    server.start()
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        _, offset, size = line.split()
        print(xxhash.xxh3_64_hexdigest(memory[int(offset) : int(offset) + int(size)]), flush=True)
    started_s = time.monotonic()
    os.eventfd_write(stop_fd, 1)
    server.join()
    context.close()
    print(json.dumps({"stop_s": time.monotonic() - started_s}), flush=True)


if __name__ == "__main__":
    main()
