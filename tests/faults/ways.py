"""How bytes move between a rank and a memory node of its host, as UCX transports of both.

First as they like, with shared memory where there is some; then over UCX from process to process; then
over UCX where it has nothing but sockets.
"""

from __future__ import annotations

from typing import Final

WAYS: Final = (None, "cma,tcp", "tcp")
