"""What a process holds of its machine."""

from __future__ import annotations

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


def engine_processes(root_pid: int) -> dict[str, int]:
    """Process ids of an SGLang server by what each process does."""
    root = psutil.Process(root_pid)
    named = {child.name().partition("::")[2]: child.pid for child in root.children(recursive=True)}
    return {"server": root_pid} | {name: pid for name, pid in named.items() if name}
