"""What a process holds of its machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import NamedTuple

import psutil


class Usage(NamedTuple):
    threads: int
    descriptors: int
    private_bytes: int  # resident and its own: heaps and stacks, not files or memory shared with others


def usage(pid: int) -> Usage:
    """What the process holds now."""
    process = psutil.Process(pid)
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return Usage(process.num_threads(), process.num_fds(), int(fields["RssAnon"].split()[0]) << 10)


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by what each is; of a TCP socket its state."""
    states = {held.fd: held.status for held in psutil.Process(pid).net_connections("tcp")}
    kinds: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        # UCX names its shared memory by a number that is each time another.
        kinds[states.get(int(name)) or re.sub(r"(:\[|_[0-9a-f]+ ).*", "", target)] += 1
    return kinds


def engine_processes(root_pid: int) -> dict[str, int]:
    """Process ids of an SGLang server by what each process does."""
    root = psutil.Process(root_pid)
    named = {child.name().partition("::")[2]: child.pid for child in root.children(recursive=True)}
    return {"server": root_pid} | {name: pid for name, pid in named.items() if name}
