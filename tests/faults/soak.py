"""A real engine and pool clients under a random schedule of faults: ``make soak``.

A tiny llama serves users whose right answers are known, beside clients that check every byte they read,
while memory nodes, clients and links fail and come back. At the end nothing may be wrong, lost or left over:
else this ends with 1. ``--seed`` repeats a schedule. Both modes have a turn, with half of the requests each,
unless ``--mode`` names one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch

from benchmarks.networks import Host, Link, network, why_not
from examples.common import tiny_models
from polarkv_sglang.transport.messages import RESERVATION_S
from tests.engine.servers import STRICT_CHECKS, Server, prompt, running_server
from tests.faults import conversations, schedule
from tests.faults.conversations import Answered, Turn, Users
from tests.faults.pool import DEADLINE_S, STEADY, TOKEN, VICTIM, Pool
from tests.faults.resources import Usage, descriptors, engine_processes, usage
from tests.faults.traffic import Tally

# L1 (and L2) hold a fraction of the conversations, and short turns are worth fetching too.
ENGINE_FLAGS: Final = ("--max-total-tokens", "1536", "--polarkv-deadline", str(DEADLINE_S))
MODE_FLAGS: Final = {
    "hicache": (
        *("--hicache-ratio", "1.2"),
        *("--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}'),
    ),
    # Long turns come in chunks, beside requests that decode: a load that fails has both computed again.
    "direct": ("--polarkv-mode", "direct", "--chunked-prefill-size", "256", "--enable-mixed-chunk"),
}
# Calls of the pool that may each take their longest, one after another, before a request is answered: two
# look-ups and a read. In direct mode it may have all that twice, and passes wait for the loads of others.
MOST_CALLS: Final = {"hicache": 3, "direct": 6 + conversations.USERS}
CONVERSATIONS: Final = 12
USER_PAUSE_S: Final = 0.3
FAULTS_AFTER_WARM_UP: Final = 6  # at least
SETTLE_S: Final = 90.0  # until all is as before: nodes are tried again after 10 s, dead peers found after 60
CONNECTIONS: Final = 4  # of a rank to a memory node: to look up, to read, to write, to watch

# A process is not leaking if it holds no more than this above what it held after the warm-up: thread pools
# and heaps still grow a little then, while a leak of one per fault or per batch is far above it. UCX keeps up
# to two connections with each of a rank's two workers after their endpoints are closed, and not always: those
# of four ranks come and go.
MORE: Final = Usage(threads=2, descriptors=4 + 4 * 2 * 2, private_bytes=16 << 20)


class Outcome(NamedTuple):
    """What a soak came to."""

    answered: Answered
    request_limit_s: float
    tallies: Sequence[Tally]
    counters: Counter[str]
    faults: Counter[str]
    before: Mapping[str, Usage]
    after: Mapping[str, Usage]
    left_over: Sequence[str]
    tracebacks: int

    def failures(self) -> list[str]:
        """What must not be; empty for a good run."""
        answered = self.answered
        found = [f"{len(answered.failed)} failed requests: {answered.failed[0]}"] if answered.failed else []
        if answered.wrong:
            found.append(f"{len(answered.wrong)} wrong answers: {answered.wrong[0]}")
        if answered.seconds[-1] > self.request_limit_s:
            found.append(f"a request took {answered.seconds[-1]:.1f} s, over {self.request_limit_s:.1f} s")
        if not answered.tokens["l3"]:
            found.append("no token came from the pool")
        if not self.counters["evictions_total"]:
            found.append("the pool was never full")
        if self.tracebacks:
            found.append(f"{self.tracebacks} tracebacks in the logs")
        return [*found, *self.left_over, *growth(self.before, self.after)]

    def __str__(self) -> str:
        answered, counters = self.answered, self.counters
        middle, late = (answered.seconds[int(q * len(answered.seconds))] for q in (0.5, 0.99))
        prompts = sum(answered.tokens.values())
        shares = ", ".join(f"{tier} {count / prompts:.0%}" for tier, count in answered.tokens.items())
        lines = [
            f"engine    {answered.requests} requests, {len(answered.failed)} failed, "
            f"{len(answered.wrong)} wrong; prompt tokens: {shares}",
            f"          seconds a request: median {middle:.2f}, 99 % {late:.2f}, "
            f"slowest {answered.seconds[-1]:.2f}, limit {self.request_limit_s:.2f}",
        ]
        for tally in self.tallies:
            lines.append(
                f"client    {tally.calls} calls, {tally.hit_blocks} blocks read right, 0 wrong, "
                f"{tally.missed_blocks} missed ({tally.corrupt_blocks} for their checksum), "
                f"{tally.stored_blocks} stored, {tally.refused_blocks} refused; "
                f"slowest call {tally.slowest_s:.2f} s"
            )
        lines.append("nodes     " + ", ".join(f"{name} {count}" for name, count in sorted(counters.items())))
        lines.append(
            "faults    " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        )
        lines.append("")
        lines.append(f"{'after warm-up -> end':24}{'threads':>14}{'descriptors':>16}{'private MiB':>20}")
        for name, was in self.before.items():
            now = self.after[name]
            lines.append(
                f"{name:24}{f'{was.threads} -> {now.threads}':>14}"
                f"{f'{was.descriptors} -> {now.descriptors}':>16}"
                f"{f'{was.private_bytes / 2**20:.1f} -> {now.private_bytes / 2**20:.1f}':>20}"
            )
        lines.append(
            f"{'may grow by':24}{MORE.threads:>14}{MORE.descriptors:>16}{MORE.private_bytes / 2**20:>20.1f}"
        )
        return "\n".join(lines)


class Soak:
    """One run over an engine and a pool of which only the engine runs yet."""

    def __init__(
        self, pool: Pool, server: Server, logs: Sequence[Path], mode: str, requests: int, seed: int
    ) -> None:
        self._pool = pool
        self._server = server
        self._logs = logs
        self._mode = mode
        self._requests = requests
        self._seed = seed
        self._started = time.monotonic()
        self._faults: Counter[str] = Counter()
        self._descriptors: dict[str, Counter[str]] = {}  # of each process, when all was settled

    def run(self) -> Outcome:
        """AssertionError if a client met a wrong byte, or if something that was mended did not come back."""
        pool, rng = self._pool, random.Random(f"{self._seed} faults")
        self._say("the engine serves without any memory node, and every turn is computed")
        turns = conversations.hold(self._server, CONVERSATIONS, self._seed)
        pool.start_nodes()
        pool.start_clients()
        with Users(self._server, turns, self._seed, USER_PAUSE_S) as users:
            self._say(
                f"{len(turns)} turns are known; memory nodes and clients are up; warm-up: each fault once"
            )
            faults = schedule.faults(pool)
            for fault in rng.sample(faults, len(faults)):
                self._suffer(fault, rng, users)
            before = self._settled(users)
            self._say("warmed up; faults at random")
            for count in itertools.count(1):
                self._suffer(rng.choice(faults), rng, users)
                if count >= FAULTS_AFTER_WARM_UP and users.answered().requests >= self._requests:
                    break
            self._say("the last fault is over")
            after = self._settled(users, before)
            answered = users.stop()
        tallies = pool.stop_clients()
        self._say("traffic has ended; what the dead have reserved expires")
        left_over = [text for number, _ in enumerate(pool.nodes) for text in self._left_over(number)]
        return Outcome(
            answered,
            _request_limit_s(turns, self._mode),
            tallies,
            pool.counters(),
            self._faults,
            before,
            after,
            left_over,
            sum(log.read_text(errors="replace").count("Traceback (most") for log in self._logs),
        )

    def _suffer(self, fault: str, rng: random.Random, users: Users) -> None:
        event = schedule.draw(fault, self._pool, rng)
        self._say(f"{users.answered().requests} requests; {event}")
        self._faults[fault] += 1
        event.happen(self._pool, rng)

    def _settled(self, users: Users, before: Mapping[str, Usage] | None = None) -> dict[str, Usage]:
        """What all processes hold once every memory node is in use and no request is under way.

        With ``before``, waits until it is no more than that, for SETTLE_S at most.
        """
        users.pause()
        for client in self._pool.clients:
            client.wait_until(
                lambda now: len(now.live) == len(self._pool.nodes), "it uses all nodes", SETTLE_S
            )
        end = time.monotonic() + SETTLE_S
        while f"polarkv_live_nodes {len(self._pool.nodes)}.0" not in self._server.get("/metrics"):
            assert time.monotonic() < end, "the engine does not use all memory nodes"
            self._server.generate(prompt(0, 20), max_new_tokens=1)  # its metrics move with requests
            time.sleep(0.2)
        end = time.monotonic() + SETTLE_S
        now = self._usage()
        while growth(before or now, now) and time.monotonic() < end:
            time.sleep(0.5)
            now = self._usage()
        self._tell_descriptors()
        users.resume()
        return now

    def _tell_descriptors(self) -> None:
        """What processes have opened and closed since the last time."""
        for name, pid in self._processes().items():
            now = descriptors(pid)
            before = self._descriptors.setdefault(name, now)
            changes = [f"+{count} {kind}" for kind, count in (now - before).items()]
            changes += [f"-{count} {kind}" for kind, count in (before - now).items()]
            if changes:
                self._say(f"descriptors of {name}: {', '.join(changes)}")

    def _usage(self) -> dict[str, Usage]:
        return {name: usage(pid) for name, pid in self._processes().items()}

    def _processes(self) -> dict[str, int]:
        engine = engine_processes(self._server.process.pid)
        pids = {f"engine {name}": pid for name, pid in engine.items()}
        pids |= {f"memory node {number}": node.running.pid for number, node in enumerate(self._pool.nodes, 1)}
        return pids | {f"client {number}": client.pid for number, client in enumerate(self._pool.steady, 1)}

    def _left_over(self, number: int) -> Iterator[str]:
        """What a memory node still holds for those who are gone."""
        node, name = self._pool.nodes[number], f"memory node {number + 1}"
        end = time.monotonic() + RESERVATION_S + 10
        while True:
            now = node.statistics()
            held = {
                "reservations": now.reservations,
                "leases": now.leases,
                "quarantined blocks": now.quarantined_blocks,
                "granted bytes": now.granted_bytes,
                "connections": max(0, now.connections - CONNECTIONS - 1),  # the engine's, and this question
            }
            if not any(held.values()) or time.monotonic() > end:
                break
            time.sleep(0.2)
        yield from (f"{name} has {count} {what} left over" for what, count in held.items() if count)
        # The engine's blocks are as long as those of the steady clients.
        victims = node.count(VICTIM.all_keys)
        used_bytes = (now.blocks - victims) * STEADY.block_bytes + victims * VICTIM.block_bytes
        if now.used_bytes != used_bytes:
            yield f"{name} has {now.used_bytes} bytes in use, its {now.blocks} blocks are {used_bytes}"

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", flush=True)


def growth(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> list[str]:
    """Where a process holds more than it may."""
    return [
        f"{name}: {what} from {was} to {now}"
        for name in before
        for what, was, now, more in zip(Usage._fields, before[name], after[name], MORE)
        if now > was + more
    ]


def _request_limit_s(turns: Sequence[Turn], mode: str) -> float:
    """Many processes share the cores."""
    computing_s = conversations.USERS * max(turn.seconds for turn in turns)
    return MOST_CALLS[mode] * STEADY.longest_call_s + computing_s


def soak(mode: str, requests: int, seed: int, link: Link | None, folder: Path) -> list[str]:
    """Run one; what was wrong. Prints its progress and what it came to, logs to ``folder``."""
    with contextlib.ExitStack() as stack:
        model = tiny_models.build("llama", folder / "model", dtype=torch.float32)
        logs = [folder / "server.log", folder / "pool.log"]
        pool = stack.enter_context(Pool(logs[1], link))
        flags = (*ENGINE_FLAGS, *MODE_FLAGS[mode], "--polarkv-nodes", ",".join(pool.addresses))
        environment = {"POLARKV_TOKEN": TOKEN} | (STRICT_CHECKS if mode == "direct" else {})
        server = stack.enter_context(running_server(model, logs[0], *flags, environment=environment))
        outcome = Soak(pool, server, logs, mode, requests, seed).run()
    print(f"\n{outcome}\n")
    return outcome.failures()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="of the engine, at least; default 2000")
    parser.add_argument("--mode", choices=MODE_FLAGS, help="default: both, half the requests each")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: at random")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="default: dropped at the end")
    parser.add_argument("--link", nargs=4, help=argparse.SUPPRESS)  # in the hub of a network of our own
    arguments = parser.parse_args()
    reason = why_not()
    if reason is None and arguments.link is None:
        return _in_a_network(sys.argv[1:], arguments.seed)
    print(f"soak of {arguments.requests} requests, --seed {arguments.seed}")
    link = None
    if arguments.link is None:
        print(f"without a link that goes down: {reason}")
    else:
        hub, host, address, device = arguments.link
        link = Link(Host(hub), Host(host), address, device)
    modes = [arguments.mode] if arguments.mode else list(MODE_FLAGS)
    failures = []
    with tempfile.TemporaryDirectory(prefix="polarkv-soak-") as temporary:
        for mode in modes:
            print(f"\n{mode} mode")
            folder = (arguments.logs or Path(temporary)) / mode
            folder.mkdir(parents=True, exist_ok=True)
            found = soak(mode, arguments.requests // len(modes), arguments.seed, link, folder)
            failures += [f"{mode} mode: {failure}" for failure in found]
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{'failed' if failures else 'passed'}: --seed {arguments.seed}, --requests {arguments.requests}")
    return 1 if failures else 0


def _in_a_network(flags: Sequence[str], seed: int) -> int:
    """Run it in a network of its own, with one memory node a link away."""
    with network(1) as (hub, (link,)):
        command = [*hub.launcher, sys.executable, "-m", "tests.faults.soak", *flags, "--seed", str(seed)]
        command += ["--link", link.hub.name, link.host.name, link.address, link.device]
        with subprocess.Popen(command) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:  # that process is told, too, and has much to end
                return process.wait()


if __name__ == "__main__":
    sys.exit(main())
