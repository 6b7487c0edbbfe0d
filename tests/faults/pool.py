"""A pool of processes to inject faults into: memory nodes, and clients that know what they must read."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Final, Self

import msgspec

from benchmarks.networks import Link
from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, Tally, TrafficProcess

TOKEN: Final = "soak"
DEADLINE_S: Final = 0.5
CAPACITY_BYTES: Final = 12 << 20  # of a memory node: all that is written fits, but not if one is gone

# The steady clients write and read the same blocks. The victim, which is frozen and killed, has longer ones.
STEADY: Final = Load(name="steady", token=TOKEN, deadline_s=DEADLINE_S, piece_bytes=12 << 10, pause_s=0.1)
VICTIM: Final = Load(
    name="victim",
    token=TOKEN,
    deadline_s=DEADLINE_S,
    piece_bytes=20 << 10,
    prompts=4,
    pause_s=0.1,
    may_freeze=True,
)
# Writes more than all memory nodes can hold.
FLOOD: Final = msgspec.structs.replace(STEADY, name="flood", prompts=80, kinds=("put",), pause_s=0.0)
# Is killed while it writes.
DYING: Final = msgspec.structs.replace(FLOOD, name="dying")


class Pool:
    """Three memory nodes, two steady clients and a victim. Leaving its ``with`` kills them all.

    Bytes move as the processes like to and from the first memory node, by TCP to and from the others. The
    last one is on a host of its own if there is a ``link`` to one.
    """

    def __init__(self, log: Path, link: Link | None) -> None:
        """Nothing runs yet. What the processes have to say goes to ``log``."""
        self.link = link
        self.nodes: list[FaultyNode] = []
        self.steady: list[TrafficProcess] = []
        self._victim: TrafficProcess | None = None
        self._log = log
        self._processes = contextlib.ExitStack()
        self._past: Counter[str] = Counter()
        for tls, where in ((None, None), ("tcp", None), ("tcp", link)):
            node = FaultyNode(
                str(CAPACITY_BYTES),
                tls=tls,
                token=TOKEN,
                host="127.0.0.1" if where is None else where.address,
                launcher=() if where is None else where.host.launcher,
                log=log,
            )
            self.nodes.append(self._processes.enter_context(node))

    @property
    def addresses(self) -> list[str]:
        return [node.address for node in self.nodes]

    @property
    def victim(self) -> TrafficProcess:
        assert self._victim is not None
        return self._victim

    @property
    def clients(self) -> list[TrafficProcess]:
        return [*self.steady, self.victim]

    def start_nodes(self) -> None:
        for node in self.nodes:
            node.start()

    def start_clients(self) -> None:
        self.steady = [self.client(msgspec.structs.replace(STEADY, seed=seed)) for seed in (1, 2)]
        self.start_victim()

    def start_victim(self) -> None:
        self._victim = self.client(VICTIM)

    def client(self, load: Load) -> TrafficProcess:
        """One more client, to the end at most."""
        return self._processes.enter_context(TrafficProcess(load, *self.addresses, log=self._log))

    def stop_clients(self) -> list[Tally]:
        """What each met. AssertionError for a wrong byte, an exception or a call past its deadline."""
        return [client.stop() for client in self.clients]

    def remember(self, node: FaultyNode) -> None:
        """Keep the counters of a memory node that is about to end."""
        self._past += _counters(node)

    def counters(self) -> Counter[str]:
        """Sums of the ``*_total`` of all memory nodes, over their lives."""
        return sum(map(_counters, self.nodes), self._past)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()


def _counters(node: FaultyNode) -> Counter[str]:
    now = msgspec.structs.asdict(node.statistics())
    counters = Counter(
        {name: now[name] for name in now if name.endswith("_total") and name != "refused_total"}
    )
    counters.update({f"refused: {reason}": count for reason, count in now["refused_total"].items()})
    return counters
