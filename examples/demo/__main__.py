"""Conversations that outgrow L1 and L2, with the pool, before and after a restart, and without it."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.common.client import RequestFailed
from examples.common.conversations import CONVERSATIONS
from examples.common.processes import (
    Process,
    engine,
    free_ports,
    memory_node,
    say,
    unwind_on_signals,
)
from examples.demo.play import PAGE_TOKENS, Demo, DemoFailed
from examples.demo.report import is_restored, summary, table, write_json
from examples.smollm2 import DEFAULT_TARGET
from polarkv_sglang.errors import PolarError

SESSIONS = 3
TURNS_BEFORE_RESTART = 2
# L1 holds one conversation of about 3,000 tokens and L2 two; three, played in turn, outgrow both. L2 has to
# exceed L1 by a conversation: what is in L1 keeps its place in L2 while L3 fills the rest.
L1_TOKENS = 3584
L2_RATIO = 2.0
POOL_CAPACITY = "3GiB"


def shared_flags() -> list[str]:
    """What both engines are started with."""
    flags = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(L1_TOKENS)]
    flags += ["--enable-hierarchical-cache", "--hicache-ratio", str(L2_RATIO)]
    if not torch.accelerator.is_available():
        # In bf16 two logits closer than its rounding can swap places between a cached and a computed prefix,
        # in plain SGLang too; equal outputs would then be a matter of luck.
        flags += ["--dtype", "float32"]
    return flags


def start(processes: list[Process]) -> None:
    for process in processes:
        say(f"starting {process.name}:\n\n    {process.command_line()}\n")
        process.start()
    for process in processes:
        process.wait_until_ready()
        say(f"{process.name} is ready")


def run(model: Path, sessions: int, spill: str | None, logs: Path) -> Demo:
    """Play everything; all processes have ended when this returns or raises."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    node_port, polarkv_port, plain_port = free_ports(3)
    polarkv_flags = ["--enable-polarkv", "--polarkv-nodes", f"127.0.0.1:{node_port}"]
    if spill:
        polarkv_flags += ["--polarkv-spill", spill]
    node = memory_node(node_port, POOL_CAPACITY, logs / "node.log")
    polarkv = engine(
        "SGLang with PolarKV", model, polarkv_port, shared_flags() + polarkv_flags, logs / "polarkv.log"
    )
    plain = engine("plain SGLang", model, plain_port, shared_flags(), logs / "plain.log")
    demo = Demo(tokenizer, sessions, polarkv_port, plain_port)
    with ExitStack() as stack:
        for process in (node, polarkv, plain):
            stack.callback(process.stop)
        start([node])
        try:
            start([polarkv, plain])
            demo.warm_up(both=True)
            demo.play_without_hit()
            for _ in range(TURNS_BEFORE_RESTART):
                demo.play_round("first")
            say(f"stopping {polarkv.name}; the memory node stays")
            polarkv.stop()
            start([polarkv])
            demo.warm_up(both=False)
            demo.play_round("after_restart", again=True)
            demo.play_round("after_restart")
        except RequestFailed as error:
            logs_end = "\n".join(process.tail() for process in (node, polarkv, plain))
            raise DemoFailed(f"{error}\n{logs_end}") from error
    return demo


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=DEFAULT_TARGET, help="as made by python -m examples.smollm2")
    option("--sessions", type=int, default=SESSIONS, help=f"conversations, up to {len(CONVERSATIONS)}")
    option("--spill", choices=("evict", "share"), help="PolarKV's spill mode; default: PolarKV's own")
    option("--json", type=Path, default=Path("demo.json"), help="where the figures go")
    option("--logs", type=Path, default=Path("build/demo"), help="folder for the processes' logs")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"there is no {args.model}; python -m examples.smollm2 makes it")
    if not 1 <= args.sessions <= len(CONVERSATIONS):
        parser.error(f"--sessions {args.sessions} is not in 1..{len(CONVERSATIONS)}")
    unwind_on_signals()

    args.logs.mkdir(parents=True, exist_ok=True)
    for log in args.logs.glob("*.log"):
        log.unlink()
    device = "an accelerator" if torch.accelerator.is_available() else "CPU only"
    say(f"SGLang {version('sglang')}, torch {version('torch')}, {os.cpu_count()} cores, {device}")
    try:
        demo = run(args.model, args.sessions, args.spill, args.logs)
    except PolarError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything the demo started has ended.", file=sys.stderr)
        return 130
    write_json(demo.turns, args.json)
    say("done")
    print(
        f"\n{table(demo.turns)}\n\n{summary(demo.turns, demo.no_hit_ratios)}\n\nwritten: {args.json}",
        flush=True,
    )
    return verdict(demo)


def verdict(demo: Demo) -> int:
    """The exit status; says what failed."""
    for difference in demo.differences:
        print(f"The demo failed: greedy outputs differ: {difference}", file=sys.stderr)
    nothing_restored = not any(is_restored(turn) for turn in demo.turns if turn.phase == "after_restart")
    if nothing_restored:
        print("The demo failed: the restarted engine took no prefix from the pool", file=sys.stderr)
    return 1 if demo.differences or nothing_restored else 0


if __name__ == "__main__":
    sys.exit(main())
