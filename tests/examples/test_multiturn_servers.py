"""The benchmarks and the shorter examples with real engines and memory nodes, in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.common import tiny_models
from examples.multiturn.cli import main
from examples.multiturn.scenarios import GLM45
from examples.two_engines import main as two_engines

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(500)]


def test_glm45_compares_all_systems_that_can_be_run_here(tmp_path: Path):
    # Nine sessions outgrow L2, which holds seven.
    small = ["--systems", "radix,hicache,hicache-file,polarkv", "--sessions", "9", "--rounds", "2"]
    paths = ["--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")]
    assert main(GLM45, [*small, "--repeats", "1", *paths]) == 0
    rows = {each["system"]: each for each in json.loads((tmp_path / "run.json").read_text())}
    assert list(rows) == ["radix", "hicache", "hicache-file", "polarkv"]
    assert all(each["outputs_equal"] and each["failed"] == 0 for each in rows.values())
    assert rows["radix"]["hit_tokens"]["l2"] == rows["radix"]["hit_tokens"]["l3"] == 0
    assert rows["hicache"]["hit_tokens"]["l2"] > 0
    for name in ("hicache-file", "polarkv"):
        assert rows[name]["hit_tokens"]["l3"] > 0, f"{name} never read from L3"
    details = json.loads((tmp_path / "run.details.json").read_text())
    assert details["restores"]["polarkv"]["prompts"] > 0
    assert (tmp_path / "run.png").stat().st_size > 0
    assert not list((tmp_path / "logs").glob("files-*")), "the file backend's files are left"


def test_what_one_engine_computed_another_fetches_and_outlives_it(tmp_path: Path, capsys):
    # Prompts are of SmolLM2's words: the vocabulary must have them.
    model = tiny_models.build("llama", tmp_path / "model", sizes={"vocab_size": 49_152})
    assert two_engines(["--model", str(model), "--logs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "B fetches what A left behind" in said.partition("killing A")[2]


def test_the_offline_engine_restores_from_the_pool():
    ran = subprocess.run(
        [sys.executable, "-m", "examples.offline_engine"],
        capture_output=True, text=True, timeout=400, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    sources = [line for line in lines if line.startswith(("computed:", "L1 hit:", "restored from L3:"))]
    texts = [line for line in lines if line.startswith("    '") or line.startswith('    "')]
    assert len(sources) == len(texts) == 3
    assert "'l1': 0, 'l2': 0, 'l3': 0" in sources[0]
    assert "'l1': 0" not in sources[1]
    assert "'l3': 0" not in sources[2]
    assert len(set(texts)) == 1
