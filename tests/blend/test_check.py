"""What makes ``polarkv blend-check`` say no, for which weights that counts, and its picture."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from examples.common import tiny_models
from polarkv_sglang.blend.check import Compared, _layer_tokens, batteries, judge
from polarkv_sglang.blend.curve import draw
from polarkv_sglang.blend.select import Selection
from polarkv_sglang.blend.stages import parse_stages
from polarkv_sglang.blend.verdict import UnknownWeights, checkpoint_digest
from polarkv_sglang.cli import main
from polarkv_sglang.errors import ConfigError


def test_what_is_wrong_with_a_model_is_named() -> None:
    right = Compared(1, 0.2, 0.2, 1e-6, 0.0, 1.0, 0.1, 2.0)
    exact = right._replace(k_error=0.0, v_error=0.0, logits=1e-6)
    ratios = (0.0, 1.0)
    assert judge(torch.float32, ratios, [[right, exact]]) == []
    (reason,) = judge(torch.float32, ratios, [[right._replace(first_k_error=0.5), exact]])
    assert "keys of layer 0 are off by 0.5" in reason
    (reason,) = judge(torch.float32, ratios, [[right, exact._replace(logits=0.01)]])
    assert "at ratio 1 logits are off by 0.01" in reason
    (reason,) = judge(torch.float32, ratios, [[right, exact._replace(v_error=0.3)]])
    assert "v_error rises from 0.2 at 0.0 to 0.3 at 1.0" in reason


def test_what_is_not_a_number_is_wrong() -> None:
    right = Compared(1, 0.2, 0.2, 1e-6, 0.0, 1.0, 0.1, 2.0)
    broken = right._replace(k_error=0.0, v_error=math.nan, logits=math.nan)
    logits, values = judge(torch.bfloat16, (0.0, 1.0), [[right, broken]])
    assert "at ratio 1 logits are off by nan" in logits
    assert "v_error rises from 0.2 at 0.0 to nan at 1.0" in values
    assert judge(torch.bfloat16, (0.0,), [[right._replace(first_k_error=math.nan)]])


def test_prompts_longer_than_the_manual_has_chapters_for_are_refused() -> None:
    def letters(text: str) -> list[int]:
        return list(text.encode())

    with pytest.raises(ConfigError, match="eight chapters for up to") as caught:
        next(batteries(letters, 10_000_000, 1))
    most = int(re.findall(r"\d+", str(caught.value))[-1])
    battery = next(batteries(letters, most, 1))
    assert most - 8 < len(battery.asked) <= most


def test_rows_are_counted_stage_by_stage() -> None:
    # 100 tokens, 60 of them cached, in 10 layers: one of all rows, three of 40 + 30, six of 40 + 6.
    selection = Selection(parse_stages(1, 0.5, "4:0.1"))
    assert _layer_tokens(100, 60, selection, 10) == 100 + 3 * 70 + 6 * 46


def test_weights_that_differ_in_one_number_of_each_tensor_are_others(tmp_path: Path) -> None:
    one = tiny_models.build("llama", tmp_path / "one", dtype=torch.float32)
    same = shutil.copytree(one, tmp_path / "same")
    assert checkpoint_digest(one) == checkpoint_digest(same)
    (file,) = same.glob("*.safetensors")
    weights = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(weights[:8], "little")
    for at in range(header, len(weights), 512):
        weights[at] ^= 1
    file.write_bytes(weights)
    assert checkpoint_digest(one) != checkpoint_digest(same)


def test_weights_that_are_not_safetensors_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    digests = set()
    for weights in (b"one", b"two", b"two"):
        file.write_bytes(weights)
        digests.add(checkpoint_digest(tmp_path))
    assert len(digests) == 2


def test_what_cannot_be_read_as_weights_is_unchecked(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def reason() -> str:
        with pytest.raises(UnknownWeights) as caught:
            checkpoint_digest(tmp_path)
        return str(caught.value)

    assert "no weights" in reason()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert "Git LFS" in reason()
    for broken in (b"", b"12", (1 << 62).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(broken)
        assert "cannot be read" in reason()
    file.unlink()
    file.symlink_to(tmp_path / "a blob that is not there")
    assert "cannot be read" in reason()


def test_a_picture_is_drawn_and_where_it_cannot_be_that_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("ratio", "k_error", "v_error", "kl", "top1_agreement", "cpu_speedup")
    file = tmp_path / "curve.png"
    draw([dict.fromkeys(names, ratio) for ratio in (0.0, 0.15, 1.0)], file, "a model")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert main(["blend-check", "no model", "--plot", str(tmp_path / "nowhere" / "curve.png")]) != 0
    assert "there is no folder" in capsys.readouterr().err
