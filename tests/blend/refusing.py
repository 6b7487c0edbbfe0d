"""What is blended by which settings, and what none can serve; run by test_passes.py in its process."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import msgspec
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from polarkv_sglang.blend.blender import _log_refusal
from polarkv_sglang.blend.model import _OFF, Unsupported, inspect_model
from polarkv_sglang.blend.offline import OfflineModel
from polarkv_sglang.blend.stages import Stage
from polarkv_sglang.blend.start import start_blending
from tests.blend.fixtures import ASKED, REUSED, SEEN
from tests.blend.scheduler import CONFIG, Scheduler, scheduling


def otherwise(off: object) -> object:
    """A value that a setting does not have where it is off."""
    if isinstance(off, bool):
        return not off
    return off + 3 if isinstance(off, int) else "something"


@pytest.mark.parametrize("setting", _OFF)
def test_settings_that_no_pass_can_serve_are_named(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    inspect_model(scheduler.runner)
    value = otherwise(_OFF[setting])
    arguments = SimpleNamespace(**{name: getattr(scheduler.runner.server_args, name) for name in _OFF})
    setattr(arguments, setting, value)
    monkeypatch.setattr(scheduler.runner, "server_args", arguments)
    with pytest.raises(Unsupported, match=f"--{setting.replace('_', '-')} {value} is set"):
        inspect_model(scheduler.runner)


def test_kv_that_no_pass_can_read_is_named(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = scheduler.runner

    def reason(target: object, name: str, value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(Unsupported) as caught:
                inspect_model(runner)
        return str(caught.value)

    latent = MLATokenToKVPool.__new__(MLATokenToKVPool)
    assert "a MLATokenToKVPool" in reason(runner, "token_to_kv_pool", latent)
    assert "quantised KV" in reason(runner.token_to_kv_pool, "dtype", torch.float8_e4m3fn)
    assert "the layout hnd" in reason(runner.token_to_kv_pool, "kv_cache_layout", "hnd")
    attention = runner.model.model.layers[1].self_attn.attn
    assert "sliding window of 128 tokens" in reason(attention, "sliding_window_size", 128)


def test_an_engine_that_cannot_blend_says_so_once_and_serves(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, attention = scheduler.cache, scheduler.runner.model.model.layers[1].self_attn.attn
    monkeypatch.setattr(attention, "sliding_window_size", 128)
    cache.blender = None
    with caplog.at_level(logging.WARNING):
        start_blending(cache, scheduler.runner)
    assert cache.blender is None
    (line,) = caplog.messages
    assert (
        "CacheBlend is off, prompts are computed in full: attention of layer 1 has a sliding window" in line
    )


def test_reasons_are_few_whatever_requests_say(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    """They are remembered, so that each is logged once."""
    scheduler.serve(SEEN)
    _log_refusal.cache_clear()
    with caplog.at_level(logging.WARNING):
        for value in range(2, 12):
            scheduler.serve(ASKED, polarkv_blend=True, polarkv_blend_ratio=value)
            scheduler.serve(ASKED, polarkv_blend=value)
    lines = [line for line in caplog.messages if "is not blended" in line]
    assert len(lines) == 2
    assert _log_refusal.cache_info().currsize == 2


def test_in_mode_all_who_does_not_refuse_is_blended(model: OfflineModel) -> None:
    with scheduling(model, msgspec.structs.replace(CONFIG, blend="all")) as scheduler:
        scheduler.serve(SEEN, polarkv_blend=False)
        assert scheduler.serve(ASKED).counts.blended > 0
        assert scheduler.serve(ASKED, polarkv_blend=False).counts == (0, 0)


def test_settings_reach_the_pass(model: OfflineModel) -> None:
    config = msgspec.structs.replace(
        CONFIG, blend_ratio=0.1, blend_strategy="first", blend_metric="kv", blend_stages="2:0.05"
    )
    with scheduling(model, config) as scheduler:
        stages, metric, strategy = scheduler.blender._selection
        assert (metric, strategy) == ("kv", "first")
        assert stages == (Stage(1, 0.1), Stage(2, 0.05))
        scheduler.serve(SEEN)
        served = scheduler.serve(ASKED, polarkv_blend=True)
        reusable = sum(served.counts)
        assert reusable > REUSED - 32
        assert served.counts.recomputed == math.floor(0.1 * reusable + 0.5)
    with scheduling(model, msgspec.structs.replace(CONFIG, blend_check_layer=2)) as scheduler:
        scheduler.serve(SEEN)
        expected = scheduler.serve(ASKED, polarkv_blend=False)
    # Of three layers the last one compares: what it has of KV is computed, and so the answer is exact.
    with scheduling(model, msgspec.structs.replace(CONFIG, blend_check_layer=2)) as scheduler:
        scheduler.serve(SEEN)
        served = scheduler.serve(ASKED, polarkv_blend=True)
        assert served.counts.blended > 0
        assert (served.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()


def test_an_answer_of_any_length_leaves_room_for_donors(scheduler: Scheduler) -> None:
    """SGLang gives a request that tells no length all that fits, and admits it by 4,096 tokens at most."""
    room = []
    for tokens in (4096, scheduler.allocator.size):
        request = scheduler.request(ASKED)
        request.sampling_params.max_new_tokens = tokens
        request.init_next_round_input(scheduler.cache)
        room.append(scheduler.blender._room(request))
    assert room[0] == room[1] > 0
