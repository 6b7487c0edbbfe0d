"""Two engines share one pool: what A computed, B fetches; A is killed, and B goes on with all that A had."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from examples import smollm2
from examples.common.client import Reply, generate
from examples.common.processes import (
    Process,
    engine,
    free_ports,
    memory_node,
    say,
    unwind_on_signals,
)
from polarkv_sglang.errors import PolarError
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import Statistics

PAGE_TOKENS = 16
PROMPT_TOKENS = 1024
MAX_NEW_TOKENS = 16
L1_TOKENS = 4096
POOL_CAPACITY = "1GiB"
STORED_TIMEOUT_S = 30.0
_VOCABULARY = range(1000, 40_000)  # plain words in SmolLM2


class ExampleFailed(PolarError):
    """B did not fetch what A had computed, or said something else than A."""


def prompt(seed: int) -> list[int]:
    """PROMPT_TOKENS tokens that no other seed begins with."""
    return [_VOCABULARY[(seed * 7919 + place * 104_729) % len(_VOCABULARY)] for place in range(PROMPT_TOKENS)]


def blocks_of(node_port: int) -> int:
    """How many blocks the memory node holds."""
    with ControlConnection.connect(
        f"127.0.0.1:{node_port}", token=None, role="observer", client="two_engines", deadline_s=5.0
    ) as connection:
        return connection.request(Statistics(connection.next_id()), 5.0).blocks


def compute_and_store(port: int, node_port: int, tokens: list[int]) -> Reply:
    """Have an engine compute a prompt, and wait until the pool has the pages of it."""
    wanted = blocks_of(node_port) + len(tokens) // PAGE_TOKENS
    reply = generate(port, tokens, MAX_NEW_TOKENS)
    deadline = time.monotonic() + STORED_TIMEOUT_S
    while blocks_of(node_port) < wanted:
        if time.monotonic() > deadline:
            raise ExampleFailed(f"the pool did not get {wanted} blocks within {STORED_TIMEOUT_S:.0f} s")
        time.sleep(0.1)
    return reply


def fetch(port: int, tokens: list[int], expected: Reply) -> Reply:
    """Ask an engine that never saw the prompt; ExampleFailed if it computes it or answers otherwise."""
    reply = generate(port, tokens, MAX_NEW_TOKENS)
    if reply.tiers is None or 2 * reply.tiers.l3 < len(tokens):
        raise ExampleFailed(f"most of the prompt did not come from the pool: {reply.tiers}")
    if reply.output_ids != expected.output_ids:
        raise ExampleFailed(f"A said {expected.text!r}, B says {reply.text!r}")
    return reply


def tell(who: str, reply: Reply) -> None:
    tiers = reply.tiers
    assert tiers is not None
    say(f"{who}: {tiers.l3} of {tiers.prompt} tokens from the pool, TTFT {reply.ttft_s:.3f} s")


def run(model: Path, logs: Path, engine_flags: Sequence[str] = ()) -> None:
    """Raises PolarError where the pool does not do what it promises; everything has ended then."""
    node_port, port_a, port_b = free_ports(3)
    flags = ["--enable-polarkv", "--polarkv-nodes", f"127.0.0.1:{node_port}", "--page-size", str(PAGE_TOKENS)]
    flags += ["--max-total-tokens", str(L1_TOKENS), *engine_flags]
    node = memory_node(node_port, POOL_CAPACITY, logs / "node.log")
    a = engine("engine A", model, port_a, flags, logs / "a.log")
    b = engine("engine B", model, port_b, flags, logs / "b.log")
    with ExitStack() as stack:
        for process in (node, a, b):
            stack.callback(process.stop)
        start([node])
        start([a, b])
        for port in (port_a, port_b):  # the first request of an engine pays for much that no later one does
            generate(port, prompt(port), 1)
        first = compute_and_store(port_a, node_port, prompt(1))
        tell("A computes", first)
        tell("B fetches what A computed", fetch(port_b, prompt(1), first))
        second = compute_and_store(port_a, node_port, prompt(2))
        tell("A computes another", second)
        say("killing A")
        a.kill()
        tell("B fetches what A left behind", fetch(port_b, prompt(2), second))
        tell("B computes its own", compute_and_store(port_b, node_port, prompt(3)))


def start(processes: Sequence[Process]) -> None:
    for process in processes:
        say(f"starting {process.name}:\n\n    {process.command_line()}\n")
        process.start()
    for process in processes:
        process.wait_until_ready()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.two_engines", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, help="default: SmolLM2, made by python -m examples.smollm2")
    option("--logs", type=Path, default=Path("build/two_engines"), help="folder for the processes' logs")
    args = parser.parse_args(arguments)
    unwind_on_signals()
    args.logs.mkdir(parents=True, exist_ok=True)
    try:
        run(args.model or smollm2.prepare(), args.logs, ["--dtype", "float32"])
    except PolarError as error:
        print(f"\nThe example failed: {error}", file=sys.stderr)
        return 1
    say("B had all that A computed, said the same, and goes on without it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
