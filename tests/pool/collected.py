"""A client that nobody has any more is collected as in a busy process: with parts of several generations."""

from __future__ import annotations

import gc
import sys

from tests.pool.rank import Rank, prompt


def main() -> None:
    gc.collect()
    gc.disable()  # but for what is collected here
    rank = Rank(sys.argv[1], blocks=100, ucx_tls="tcp", deadline_s=5.0)
    assert all(rank.put(prompt("few", 10)))
    gc.collect(0)
    assert all(rank.put(prompt("many", 100)))  # more than it had buffers for
    rank.client.close()
    del rank
    gc.collect()
    print("collected")


if __name__ == "__main__":
    main()
