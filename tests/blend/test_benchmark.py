"""The benchmark of CacheBlend: what it asks and prints, and that it runs as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.blend import DOCUMENTS, Measured, Pair, orders, summary
from examples.common import tiny_models

ROOT = Path(__file__).parents[2]


def test_no_prompt_begins_like_another_and_no_document_stays_in_its_place() -> None:
    found = list(orders(DOCUMENTS - 1))
    assert len({0, *(order[0] for order in found)}) == DOCUMENTS
    for order in found:
        assert sorted(order) == list(range(DOCUMENTS))
        assert all(at != place for place, at in enumerate(order))


def test_tables_tell_how_much_less_error_and_time_there_is() -> None:
    row = {"ratio": 0.0, "layer_tokens": 5272, "k_error": 0.07, "v_error": 0.2, "kl": 0.1}
    row |= {"top1_agreement": 0.9, "cpu_speedup": 12.0}
    rows = [row, {**row, "ratio": 0.15, "v_error": 0.15}]
    pairs = [Pair(threads, 4000, 3300, 600, 2.0, full) for threads in (1, 2) for full in (8.0, 20.0, 9.0)]
    text = summary(Measured("abc", "a processor, 2 cores", 1, 4000, 0.15, rows, pairs))
    assert "| 0.15 | 5,272 | 0.070 | 0.150 | -25 % | 0.1000 | 90 % | 12.0 |" in text
    assert "| 2 | 2.0, 2.0, 2.0 | 8.0, 20.0, 9.0 | 4.5 | 4.0, 10.0, 4.5 |" in text


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(400)
def test_one_command_checks_and_asks(tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "llama", dtype=torch.float32)
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.blend", "--model", str(model), "--tokens", "1200"]
    command += ["--pairs", "2", "--threads", "1", "--json", str(file), "--logs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert [row["ratio"] for row in figures["check"]] == [0.0, 0.05, 0.15, 0.3, 1.0]
    assert len(figures["pairs"]) == 2
    assert all(pair["blended_tokens"] > 0.7 * pair["prompt_tokens"] for pair in figures["pairs"])
