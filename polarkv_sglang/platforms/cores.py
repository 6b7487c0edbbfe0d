"""Which cores each rank computes on.

SGLang works this out for every CPU rank, but carries it out with a kernel that only its AMX and ARM builds
have; without it each rank starts a thread per core of the host, and ranks spend their time waiting for cores.
"""

from __future__ import annotations

import os

import torch

from polarkv_sglang.errors import ConfigError


def cores_of_rank(*, numa_index: int, world_size: int) -> str:
    """The cores of rank ``numa_index`` as a list such as "0,2-3"; empty: PyTorch's choice.

    Stands in for SGLang's ``numa_utils.init_threads_binding``, which refuses more ranks than NUMA nodes
    unless SGLANG_CPU_OMP_THREADS_BIND ("0-3|4-7") is set; we follow that, or else share the cores equally.
    Raises ConfigError if SGLANG_CPU_OMP_THREADS_BIND has no group for this rank.
    """
    chosen = os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all")
    if chosen != "all":
        groups = chosen.split("|")
        if numa_index >= len(groups):
            raise ConfigError(
                f"SGLANG_CPU_OMP_THREADS_BIND={chosen!r} has no group for rank {numa_index}: add one per rank"
            )
        return groups[numa_index]
    if world_size == 1:
        return ""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[numa_index * len(cores) // world_size : (numa_index + 1) * len(cores) // world_size]
    return ",".join(map(str, share or [cores[numa_index % len(cores)]]))


def bind_rank(*, local_omp_cpuid: str, dist_init_method: str | None = None) -> None:
    """Keep this process on the cores that ``cores_of_rank`` gave it.

    Stands in for SGLang's ``bootstrap._init_cpu_threads_env``. Raises ConfigError if the list is malformed.
    """
    if not local_omp_cpuid:
        return
    cores = parse_cores(local_omp_cpuid)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(min(len(cores), torch.get_num_threads()))


def parse_cores(text: str) -> set[int]:
    """Read a list such as "0,2-3"; raises ConfigError if it is malformed."""
    cores: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            cores.update(range(int(first), int(last if dash else first) + 1))
    except ValueError as error:
        raise ConfigError(
            f"SGLANG_CPU_OMP_THREADS_BIND: {text!r} is not a list of cores such as 0,2-3"
        ) from error
    return cores
