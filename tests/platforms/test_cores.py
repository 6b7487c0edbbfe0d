from __future__ import annotations

import os

import pytest

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.platforms.cores import cores_of_rank, parse_cores

BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def test_one_rank_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BIND, raising=False)
    assert cores_of_rank(numa_index=0, world_size=1) == ""


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_cores_evenly_and_each_gets_one(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.delenv(BIND, raising=False)
    cores = os.sched_getaffinity(0)
    shares = [parse_cores(cores_of_rank(numa_index=rank, world_size=ranks)) for rank in range(ranks)]
    assert set().union(*shares) == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if ranks <= len(cores):
        assert sum(map(len, shares)) == len(cores)


def test_the_users_choice_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BIND, "0-1|4,6-7")
    assert parse_cores(cores_of_rank(numa_index=1, world_size=2)) == {4, 6, 7}


def test_a_rank_without_cores_is_an_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BIND, "0")
    with pytest.raises(ConfigError, match=rf"{BIND}='0' has no group for rank 1"):
        cores_of_rank(numa_index=1, world_size=2)


@pytest.mark.parametrize("text", ["a", "1-", "1,,2", "-3"])
def test_a_malformed_list_of_cores_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=BIND):
        parse_cores(text)
