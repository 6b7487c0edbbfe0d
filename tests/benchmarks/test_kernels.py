"""The benchmark of the kernels as far as a CPU gets."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import MODELS, Model, Workload, kernels, main, parse_arguments, rank_of

MHA = Model(layers=3, heads=4, parts=((2, 16), (2, 16)), rotary_dims=8)
MLA = Model(layers=2, heads=4, parts=((1, 24),), rotary_dims=8)


@pytest.mark.parametrize("model", [MHA, MLA], ids=["mha", "mla"])
def test_every_kernel_runs_on_the_operands_that_are_prepared_for_it(model: Model) -> None:
    work = Workload(model, page_size=4, blocks=2, context=10, ratio=0.5)
    for kernel in kernels(work):
        kernel.prepare(torch.device("cpu"))()
        assert kernel.bytes_moved > 0


def test_bytes_moved_are_read_and_written_once() -> None:
    work = Workload(MHA, page_size=4, blocks=2, context=10, ratio=0.5)
    moved = {kernel.name: kernel.bytes_moved for kernel in kernels(work)}
    blocks, layer = 2 * (3 * 4 * 128), 10 * 128  # a token has 2 * 2 * 16 numbers of 2 bytes in a layer
    assert moved == {
        "pack_blocks": 2 * blocks,
        "unpack_blocks": 2 * blocks,
        "checksum_blocks": blocks + 2 * 8,
        "rotate_keys": layer,
        "kv_deviation": 2 * layer + 40,
        "sparse_query_attention": layer + 2 * (5 * 4 * 16 * 2),
    }


def test_a_rank_has_its_share_of_heads_and_at_least_one_of_kv() -> None:
    assert rank_of(MODELS["glm-4.5"], 8).parts == ((1, 128), (1, 128))
    assert rank_of(MODELS["glm-4.5"], 16).parts == ((1, 128), (1, 128))
    assert rank_of(MODELS["deepseek-v3"], 8)[1:3] == (16, ((1, 576),))
    with pytest.raises(ValueError, match="96 heads cannot be split over 7"):
        rank_of(MODELS["glm-4.5"], 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "glm-4.5", "--blocks", "8"]) == 2
    output = capsys.readouterr()
    assert "pack_blocks" in output.out
    assert "needs a GPU" in output.err


@pytest.mark.parametrize(
    "wrong", [["--blocks", "0"], ["--ratio", "0"], ["--ratio", "1.5"], ["--model", "gpt-2"]]
)
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_every_kernel_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--blocks", "2", "--context", "512"]) == 0
    assert capsys.readouterr().out.count("of the copy") == 6
