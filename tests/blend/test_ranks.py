"""Tensor parallelism: every rank chooses the same rows, and they are those that one rank alone chooses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.common import tiny_models
from tests.support import free_port

ROOT = Path(__file__).parents[2]


def start(module: str, argument: str, ranks: int) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    command = [sys.executable, "-m", f"tests.blend.{module}", argument]
    return [
        subprocess.Popen(
            [*command, str(rank), str(ranks), port],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def result(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=100)
    lines = [line for line in out.splitlines() if line.startswith("RESULT")]
    assert lines, err[-3000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def results(processes: list[subprocess.Popen[str]]) -> list[Any]:
    try:
        return list(map(result, processes))
    finally:
        for process in processes:
            process.kill()


def test_ranks_that_see_other_heads_choose_the_same_rows() -> None:
    first, second = results(start("choosing_rank", "7", 2))
    fresh, cached = torch.randn(2, 200, 4, 16, generator=torch.Generator().manual_seed(7))
    deviation = (fresh - cached).flatten(1).norm(dim=1)
    alone = [sorted(deviation.topk(count).indices.tolist()) for count in (1, 30, 100, 200)]
    assert first == second == alone


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm4_moe"])
def test_every_rank_chooses_the_same_rows_and_at_ratio_one_answers_exactly(
    tmp_path: Path, architecture: str
) -> None:
    model = tiny_models.build(architecture, tmp_path / "model", dtype=torch.float32)
    processes = start("rank", str(model), 1) + start("rank", str(model), 2)
    alone, first, second = results(processes)
    assert first[0] == second[0] == alone[0]
    assert len({str(rows) for rows in alone[0]}) == len(alone[0])
    for blended, whole in (first[1], second[1]):
        assert blended > 1e-2
        assert whole < 1e-5
    for difference, equal in (pair for each in (alone, first, second) for pair in each[2]):
        assert difference < 1e-4
        assert equal
