"""What a blended pass promises, on real models; run by test_passes.py in a process of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from sglang.srt.models import qwen3_moe

from polarkv_sglang.blend import forward
from polarkv_sglang.blend.offline import OfflineModel
from polarkv_sglang.blend.plan import Plan
from polarkv_sglang.blend.select import Selection
from polarkv_sglang.blend.stages import Stage
from tests.blend.fixtures import (
    ASKED,
    RATIOS,
    REUSED,
    SEEN,
    TAIL,
    by,
    load,
    plan_of,
    relative,
)
from tests.engine.servers import prompt

# Of what Qwen3 has, GLM-4.5 has the norms of Q and K, and Llama the rotation of whole heads.
ARCHITECTURES = (
    "llama",
    "glm4_moe",
    *(pytest.param(architecture, marks=pytest.mark.slow) for architecture in ("qwen3", "qwen3_moe")),
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OfflineModel:
    return load(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture
def clean(model: OfflineModel) -> Iterator[OfflineModel]:
    model.clear()
    yield model
    model.clear()


@pytest.mark.parametrize("passes", [(), (100, 320), (261,)], ids=str)
def test_at_ratio_one_logits_and_kv_are_those_of_a_full_prefill(
    clean: OfflineModel, passes: tuple[int, ...]
) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED, tail=TAIL)
    blended = clean.prefill(ASKED, plan=plan_of(donor), selection=by(1.0), passes=passes, tail=TAIL)
    # The last row of each pass is computed anyway.
    assert sum(blended.counts) >= REUSED - len(passes)
    assert blended.counts.blended == 0
    scale = full.logits.abs().max()
    assert (blended.logits - full.logits).abs().max() < 1e-4 * scale
    assert torch.equal(blended.logits.argmax(-1), full.logits.argmax(-1))
    for mine, theirs in zip(clean.kv(blended.slots), clean.kv(full.slots)):
        assert relative(mine, theirs) < 1e-5


def test_an_exact_prefix_may_end_in_the_middle_of_a_chunk(clean: OfflineModel) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED, tail=TAIL)
    # Tokens 11 to 48 are known as a prefix; their chunk goes on at 48.
    plan = Plan([donor.pieces(374, 587, 48), donor.pieces(40, 337, 261)])
    exact = clean.prefill(ASKED, plan=plan, selection=by(1.0), passes=(48,), tail=TAIL)
    assert (exact.logits - full.logits).abs().max() < 1e-4 * full.logits.abs().max()
    blended = clean.prefill(ASKED, plan=plan, selection=by(0.3), passes=(48,), tail=TAIL)
    prefix = [buffer[:, :48] for buffer in clean.kv(blended.slots)]
    for mine, theirs in zip(prefix, clean.kv(full.slots)):
        assert relative(mine, theirs[:, :48]) < 1e-5
    assert blended.counts.blended == REUSED - 37 - blended.counts.recomputed > 0


def test_kv_error_never_rises_with_the_ratio(clean: OfflineModel) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED)
    exact = clean.kv(full.slots)
    errors = []
    for ratio in RATIOS:
        blended = clean.prefill(ASKED, plan=plan_of(donor), selection=by(ratio))
        assert blended.counts.recomputed == math.floor(ratio * REUSED + 0.5)
        errors.append([relative(mine, theirs) for mine, theirs in zip(clean.kv(blended.slots), exact)])
    for less, more in pairwise(errors):
        assert more[0] <= less[0]
        assert more[1] <= less[1]
    assert errors[0][1] > 0.05, "nothing to recompute: the test shows nothing"
    assert max(errors[-1]) < 1e-5


def test_rows_are_those_whose_values_deviate_most_and_layers_before_are_exact(clean: OfflineModel) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED)
    blended = clean.prefill(ASKED, plan=plan_of(donor), selection=by(0.15))
    keys, values = clean.kv(blended.slots)
    exact_keys, exact_values = clean.kv(full.slots)
    for mine, theirs in ((keys, exact_keys), (values, exact_values)):
        # Layer 0 was computed for all rows, and so are the keys and values of the check layer.
        assert relative(mine[:2], theirs[:2]) < 1e-5
        assert relative(mine[2], theirs[2]) > 1e-2
    old = clean.kv(donor.slots)[1][1]
    rows = torch.tensor([*range(11, 261), *range(261, 558)])
    before = torch.cat([old[337:587], old[40:337]])
    deviation = (exact_values[1, rows] - before).flatten(1).norm(dim=1)
    count = blended.counts.recomputed
    expected = set(rows[deviation.topk(count).indices].tolist()) | set(range(11)) | set(range(558, 578))
    assert set(blended.computed_rows[0]) == expected


def bottom_right(query, keys, values, queries, scale):  # type: ignore[no-untyped-def]
    """What a prefill kernel does with ``causal=True``: the last query sees all keys, the others fewer."""
    end = int(queries.positions[-1]) + 1
    aligned = torch.arange(end - len(queries.positions), end)
    return sparse_query_attention(query, keys, values, queries._replace(positions=aligned), scale)


sparse_query_attention = forward.sparse_query_attention


def test_no_row_sees_what_follows_it(clean: OfflineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document, something new, a document: the first one's KV knows nothing of what is new."""
    donor = clean.prefill(SEEN)
    plan = Plan([donor.pieces(337, 587, 11), donor.pieces(40, 337, 261 + TAIL)])
    selection = by(0.15, strategy="first")  # of the same rows, whatever is new

    def kv_before(new: list[int]) -> torch.Tensor:
        asked = ASKED[:261] + new + ASKED[261:]
        blended = clean.prefill(asked, plan=plan, selection=selection)
        return torch.stack(clean.kv(blended.slots[:261]))

    assert relative(kv_before(prompt(5, TAIL)), kv_before(prompt(6, TAIL))) < 1e-6
    monkeypatch.setattr(forward, "sparse_query_attention", bottom_right)
    assert relative(kv_before(prompt(5, TAIL)), kv_before(prompt(6, TAIL))) > 1e-3


def test_a_later_check_layer_leaves_those_before_it_exact(clean: OfflineModel) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED, tail=TAIL)
    for ratio in (0.15, 1.0):
        selection = Selection((Stage(2, ratio),))
        blended = clean.prefill(ASKED, plan=plan_of(donor), selection=selection, tail=TAIL)
        assert blended.counts.recomputed == math.floor(ratio * REUSED + 0.5)
        # It is the last of three layers, and has all rows' keys and values itself.
        for mine, theirs in zip(clean.kv(blended.slots), clean.kv(full.slots)):
            assert relative(mine, theirs) < 1e-5
        assert (blended.logits - full.logits).abs().max() < 1e-4 * full.logits.abs().max()


def test_no_kernel_of_the_model_writes_kv_meanwhile(
    clean: OfflineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-MoE's rotary embedding does on CUDA in bf16. Here is no such kernel: it must not be wanted."""
    if not isinstance(clean.runner.model, qwen3_moe.Qwen3MoeForCausalLM):
        pytest.skip("the others leave that to their attention")
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED, tail=TAIL)
    monkeypatch.setattr(qwen3_moe, "enable_fused_set_kv_buffer", lambda _batch: True)
    blended = clean.prefill(ASKED, plan=plan_of(donor), selection=by(1.0), tail=TAIL)
    assert (blended.logits - full.logits).abs().max() < 1e-4 * full.logits.abs().max()
    assert all(layer.self_attn.compatible_with_fused_kv_buffer for layer in clean.model.layers)


def test_donors_and_all_other_slots_stay_as_they_are(clean: OfflineModel) -> None:
    donor = clean.prefill(SEEN)
    other = clean.prefill(prompt(9, 200))
    before = [torch.stack(clean.kv(each.slots)) for each in (donor, other)]
    clean.prefill(ASKED, plan=plan_of(donor), selection=by(0.15), passes=(100, 320))
    for each, kv in zip((donor, other), before):
        assert torch.equal(torch.stack(clean.kv(each.slots)), kv)


@pytest.mark.parametrize("metric", ["v", "k", "kv"])
def test_stages_narrow_what_is_computed(clean: OfflineModel, metric: str) -> None:
    donor, full = clean.prefill(SEEN), clean.prefill(ASKED)
    selection = by(0.3, Stage(2, 0.1), metric=metric)
    blended = clean.prefill(ASKED, plan=plan_of(donor), selection=selection)
    uncached = len(ASKED) - REUSED
    assert blended.counts.recomputed == math.floor(0.3 * REUSED + 0.5)
    assert len(blended.computed_rows[0]) == uncached + math.floor(0.1 * REUSED + 0.5)
    wide = clean.prefill(ASKED, plan=plan_of(donor), selection=by(0.3, metric=metric))
    assert set(blended.computed_rows[0]) < set(wide.computed_rows[0])
    # The last of three layers compares: what it keeps of both is equal.
    exact, narrow, whole = (clean.kv(each.slots) for each in (full, blended, wide))
    for kind in (0, 1):
        assert relative(narrow[kind], exact[kind]) == pytest.approx(
            relative(whole[kind], exact[kind]), rel=1e-3
        )


def test_the_first_tokens_of_each_piece_are_a_choice(clean: OfflineModel) -> None:
    donor = clean.prefill(SEEN)
    blended = clean.prefill(ASKED, plan=plan_of(donor), selection=by(0.1, strategy="first"))
    assert blended.counts.recomputed == 55
    first = {*range(11, 11 + 28), *range(261, 261 + 27)}
    assert set(blended.computed_rows[0]) == {*range(11), *first, *range(558, 578)}


def test_forward_methods_that_were_replaced_before_a_pass_are_there_after_it(clean: OfflineModel) -> None:
    donor = clean.prefill(SEEN)
    layer, calls = clean.model.layers[1], []
    original = layer.forward

    @functools.wraps(original)
    def replaced(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(*args, **kwargs)

    layer.forward = replaced  # type: ignore[method-assign]
    try:
        clean.prefill(ASKED, plan=plan_of(donor), selection=by(0.15))
        assert layer.forward is replaced
        assert calls
    finally:
        del layer.__dict__["forward"]
