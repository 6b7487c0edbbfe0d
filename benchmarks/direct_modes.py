"""Direct mode beside hicache mode and an L1 hit: time to first token of a prompt that the pool has.

Two engines with one model share one memory node. In every round each of them loses L1 and L2, restores the
prompt from the pool, and has it three times from L1; which of the two begins changes from round to round.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from examples.common.client import Reply, generate
from examples.common.conversations import fresh_prompts
from examples.common.processes import (
    Process,
    engine,
    free_ports,
    memory_node,
    say,
    unwind_on_signals,
)
from examples.smollm2 import DEFAULT_TARGET
from polarkv_sglang.errors import PolarError

MODES = ("direct", "hicache")
PROMPT_TOKENS = 3000
PAGE_TOKENS = 16
L1_TOKENS = 3584
CAPACITY = "2GiB"
ROUNDS = 9
L1_REPEATS = 3
WAKE_TOKENS = 32
FLUSH_S = 20.0  # that a write to the pool may take to end


class ModesFailed(PolarError):
    """Something was not served as it was to be measured."""


class Round(NamedTuple):
    """One engine's times to first token, seconds."""

    mode: str
    transport: str
    prompt_tokens: int
    from_pool_tokens: int
    restored_s: float
    l1_hit_s: float  # of the same prompt at once afterwards; median of L1_REPEATS


def engine_flags(mode: str, node_port: int, tls: str | None) -> list[str]:
    # The engine that is not asked leaves the cores to the other.
    flags = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(L1_TOKENS), "--sleep-on-idle"]
    flags += ["--enable-polarkv", "--polarkv-nodes", f"127.0.0.1:{node_port}", "--polarkv-mode", mode]
    if mode == "hicache":
        flags += ["--hicache-ratio", "2", "--hicache-mem-layout", "page_first_direct"]
    if tls is not None:
        flags += ["--polarkv-ucx-tls", tls]
    if not torch.accelerator.is_available():
        flags += ["--dtype", "float32"]  # so that cached and computed prefixes round alike
    return flags


class Engine:
    """One of the engines that are compared."""

    def __init__(self, mode: str, port: int, transport: str) -> None:
        self.mode = mode
        self.port = port
        self.transport = transport

    def flush(self) -> None:
        """Lose L1 and L2. Raises ModesFailed."""
        end = time.monotonic() + FLUSH_S
        while time.monotonic() < end:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request("POST", "/flush_cache")
                if connection.getresponse().status == 200:
                    return
            finally:
                connection.close()
            time.sleep(0.1)
        raise ModesFailed(f"the {self.mode} engine could not be flushed")

    def store(self, prompt: list[int]) -> Reply:
        """Have the prompt in the pool, and the way back warm; the reply when it was restored."""
        generate(self.port, prompt, 4)
        end = time.monotonic() + FLUSH_S
        while time.monotonic() < end:
            self.flush()
            reply = generate(self.port, prompt, 4)
            if _from_pool(reply) >= _whole_pages(prompt):
                return reply
            time.sleep(0.5)
        raise ModesFailed(f"the {self.mode} engine did not restore the prompt: {reply.tiers}")

    def measure(self, prompt: list[int], wake: list[int]) -> Round:
        self.flush()
        generate(self.port, wake, 2)  # it sleeps while the other one works
        restored = generate(self.port, prompt, 1)
        hits = [generate(self.port, prompt, 1) for _ in range(L1_REPEATS)]
        if _from_pool(restored) < _whole_pages(prompt):
            raise ModesFailed(f"the {self.mode} engine did not restore the prompt: {restored.tiers}")
        if any(hit.tiers is None or hit.tiers.l1 < _whole_pages(prompt) for hit in hits):
            raise ModesFailed(f"the {self.mode} engine had the prompt in L1 no more")
        if any(hit.output_ids != restored.output_ids for hit in hits):
            raise ModesFailed(f"the {self.mode} engine answered differently from L1 and from the pool")
        return Round(
            self.mode,
            self.transport,
            len(prompt),
            _from_pool(restored),
            restored.ttft_s,
            median(hit.ttft_s for hit in hits),
        )


def _from_pool(reply: Reply) -> int:
    return reply.tiers.l3 if reply.tiers is not None else 0


def _whole_pages(prompt: list[int]) -> int:
    """Tokens that can be cached: the last one is always computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def run(model: Path, tls: str | None, rounds: int, tokens: int, logs: Path) -> list[Round]:
    """Measure; every process has ended when this returns or raises."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (prompt,) = islice(fresh_prompts(tokenizer, tokens, seed=1), 1)
    wakes = fresh_prompts(tokenizer, WAKE_TOKENS, seed=2)
    node_port, *ports = free_ports(1 + len(MODES))
    node = memory_node(node_port, CAPACITY, logs / "direct_modes_node.log")
    processes = [
        engine(f"{mode} engine", model, port, engine_flags(mode, node_port, tls), logs / f"modes_{mode}.log")
        for mode, port in zip(MODES, ports, strict=True)
    ]
    engines = [Engine(mode, port, tls or "shm") for mode, port in zip(MODES, ports, strict=True)]
    found: list[Round] = []
    with ExitStack() as stack:
        for process in (node, *processes):
            stack.callback(process.stop)
        _start([node])
        _start(processes)
        replies = [each.store(prompt).output_ids for each in engines]
        if replies[0] != replies[1]:
            raise ModesFailed("the modes answered differently")
        for number in range(rounds):
            for each in engines if number % 2 == 0 else reversed(engines):
                found.append(each.measure(prompt, next(wakes)))
    return found


def _start(processes: list[Process]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.wait_until_ready()
        say(f"{process.name} is ready")


def summary(found: list[Round]) -> str:
    lines = []
    medians = {}
    for mode in MODES:
        rows = [each for each in found if each.mode == mode]
        restored = sorted(each.restored_s for each in rows)
        medians[mode] = median(restored)
        hit = median(each.l1_hit_s for each in rows)
        ratio = median(each.restored_s / each.l1_hit_s for each in rows)
        lines.append(
            f"{mode} over {rows[0].transport}: {rows[0].from_pool_tokens} tokens restored in "
            f"{1e3 * medians[mode]:.0f} ms ({1e3 * restored[0]:.0f}-{1e3 * restored[-1]:.0f}), "
            f"L1 hit {1e3 * hit:.0f} ms; restored / L1 hit {ratio:.2f}"
        )
    lines.append(f"direct / hicache: {medians['direct'] / medians['hicache']:.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.direct_modes", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=DEFAULT_TARGET, help="as made by python -m examples.smollm2")
    option("--tokens", type=int, default=PROMPT_TOKENS, help="of the prompt; default: %(default)s")
    option("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    option("--ucx-tls", metavar="LIST", help="as --polarkv-ucx-tls; default: shared memory")
    option("--json", type=Path, help="file for the figures, one object a line")
    option("--logs", type=Path, default=Path("build/direct_modes"), help="folder for the processes' logs")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"there is no {args.model}; python -m examples.smollm2 makes it")
    if args.rounds < 1 or not 2 * PAGE_TOKENS <= args.tokens <= L1_TOKENS - 2 * PAGE_TOKENS:
        parser.error(f"--rounds is at least 1, --tokens {2 * PAGE_TOKENS} to {L1_TOKENS - 2 * PAGE_TOKENS}")
    unwind_on_signals()
    args.logs.mkdir(parents=True, exist_ok=True)
    for log in args.logs.glob("*.log"):
        log.unlink()
    try:
        found = run(args.model, args.ucx_tls, args.rounds, args.tokens, args.logs)
    except PolarError as error:
        print(f"The benchmark failed: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_text("".join(f"{json.dumps(each._asdict())}\n" for each in found), encoding="utf-8")
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
