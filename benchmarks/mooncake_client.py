"""A client of a Mooncake store in a process of its own; needs `mooncake`, and nothing of PolarKV.

Reads one JSON command a line from stdin and answers each with one JSON line:

    {"do": "put" | "get", "keys": [...], "offset": bytes, "block_bytes": n}  ->  {"seconds": s}
    {"do": "remove", "keys": [...]}                                          ->  {}

Blocks lie one after the other in shared memory, from `offset` on. Whatever fails is {"error": text}.
The first line is an answer without a command: {"version": text}, once the store can be used.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import mmap
import os
import sys
import time

from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]


class StoreFailed(Exception):
    """Mooncake answered a call with an error code."""


class Client:
    """The zero-copy calls of the store over one registered buffer."""

    def __init__(self, master: str, descriptor: int, length: int) -> None:
        self._memory = mmap.mmap(descriptor, length)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._store = MooncakeDistributedStore()
        # No segment of our own (0), or blocks would be copied within this process.
        code = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", master)
        self._require(code == 0, f"setup returned {code}")
        code = self._store.register_buffer(self._base, length)
        self._require(code == 0, f"register_buffer returned {code}")

    def put(self, keys: list[str], offset: int, block_bytes: int) -> float:
        """Seconds that the put took."""
        addresses = self._addresses(keys, offset, block_bytes)
        sizes = [block_bytes] * len(keys)
        started = time.perf_counter()
        if len(keys) == 1:
            codes = [self._store.put_from(keys[0], addresses[0], block_bytes)]
        else:
            codes = self._store.batch_put_from(keys, addresses, sizes)
        seconds = time.perf_counter() - started
        self._require(codes == [0] * len(keys), f"put returned {sorted(set(codes))}")
        return seconds

    def get(self, keys: list[str], offset: int, block_bytes: int) -> float:
        """Seconds that the get took."""
        addresses = self._addresses(keys, offset, block_bytes)
        sizes = [block_bytes] * len(keys)
        started = time.perf_counter()
        if len(keys) == 1:
            codes = [self._store.get_into(keys[0], addresses[0], block_bytes)]
        else:
            codes = self._store.batch_get_into(keys, addresses, sizes)
        seconds = time.perf_counter() - started
        self._require(codes == sizes, f"get returned {sorted(set(codes))}")
        return seconds

    def remove(self, keys: list[str]) -> None:
        for key in keys:
            code = self._store.remove(key, True)  # at once, whatever leases there are
            self._require(code == 0, f"remove returned {code}")

    def close(self) -> None:
        self._store.close()

    def _addresses(self, keys: list[str], offset: int, block_bytes: int) -> list[int]:
        start = self._base + offset
        return [start + number * block_bytes for number in range(len(keys))]

    @staticmethod
    def _require(condition: bool, text: str) -> None:
        if not condition:
            raise StoreFailed(text)


def answer(client: Client, command: dict[str, object]) -> dict[str, object]:
    """Carry one command out."""
    arguments = {name: value for name, value in command.items() if name != "do"}
    try:
        match command["do"]:
            case "put":
                return {"seconds": client.put(**arguments)}  # type: ignore[arg-type]
            case "get":
                return {"seconds": client.get(**arguments)}  # type: ignore[arg-type]
            case "remove":
                client.remove(**arguments)  # type: ignore[arg-type]
                return {}
            case unknown:
                return {"error": f"unknown command {unknown!r}"}
    except StoreFailed as error:
        return {"error": str(error)}


def version() -> str:
    """Of the installed distribution, with its name."""
    name = importlib.metadata.packages_distributions()["mooncake"][0]
    return f"{name} {importlib.metadata.version(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--master", required=True, help="HOST:PORT of mooncake_master's RPC server")
    parser.add_argument("--descriptor", type=int, required=True, help="inherited, of the shared memory")
    parser.add_argument("--length", type=int, required=True, help="bytes of the shared memory")
    args = parser.parse_args()
    # Only answers may reach stdout, and Mooncake's libraries write where they like.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        client = Client(args.master, args.descriptor, args.length)
    except StoreFailed as error:
        print(json.dumps({"error": str(error)}), file=answers)
        sys.exit(1)
    print(json.dumps({"version": version()}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(client, json.loads(line))), file=answers)
    client.close()


if __name__ == "__main__":
    main()
