from __future__ import annotations

from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from statistics import fmean

import msgspec
import pytest

from examples.common import tiny_models
from examples.multiturn.presets import Conversations, from_gigabytes, scaled
from examples.multiturn.scenarios import CHATBOT, CODER, GLM45
from examples.multiturn.sessions import schedule, speakers
from examples.multiturn.systems import SYSTEMS, Setting, choose
from polarkv_sglang.errors import ConfigError

SCENARIOS = (GLM45, CHATBOT, CODER)
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
TALK = Conversations(
    sessions=8, rounds=10, history_tokens=64, question_tokens=16, answer_tokens=16, vocabulary=500
)


# --- sizes


def test_glm45_is_the_published_setting():
    preset = GLM45.published
    assert preset.tiers.l1_tokens * preset.tiers.token_bytes == pytest.approx(44e9, rel=1e-3)
    assert preset.tiers.l2_tokens * preset.tiers.token_bytes == pytest.approx(256e9, rel=1e-3)
    assert preset.tiers.l3_bytes == pytest.approx(450e9, rel=1e-3)
    assert (preset.conversations.history_tokens, preset.conversations.rounds) == (10_000, 10)
    assert (preset.qps, preset.tp) == (4.0, 8)


@pytest.mark.parametrize(
    ("scenario", "history"), [(CHATBOT, 3000), (CODER, 200_000)], ids=["chatbot", "coder"]
)
def test_the_others_have_the_published_history_and_rounds(scenario, history):
    assert scenario.published.conversations.history_tokens == history
    assert scenario.published.conversations.rounds == 10


def test_the_laptop_glm45_has_the_published_pages_rounds_and_proportions():
    def proportions(preset):
        sizes = preset.tiers
        parts = (sizes.l2_tokens, sizes.l3_tokens, preset.conversations.working_set_tokens)
        return [part / sizes.l1_tokens for part in parts]

    published, laptop = GLM45.published, GLM45.laptop
    assert proportions(laptop) == pytest.approx(proportions(published), rel=0.01)
    assert laptop.conversations.rounds == published.conversations.rounds
    pages = [-(-each.conversations.history_tokens // each.page_tokens) for each in (published, laptop)]
    assert pages == [157, 157]


@pytest.mark.parametrize("scenario", [GLM45, CODER], ids=lambda scenario: scenario.name)
def test_random_tokens_are_of_the_tiny_models_vocabulary(scenario):
    assert scenario.laptop.conversations.vocabulary == tiny_models.VOCAB_SIZE


@each_scenario
def test_every_laptop_preset_fits_the_tiers_and_outgrows_l2(scenario):
    preset = scenario.laptop
    talk, sizes = preset.conversations, preset.tiers
    assert talk.rounds >= 6
    assert talk.final_tokens <= sizes.l1_tokens
    # What is in L1 keeps its place in L2: a prompt comes back whole only if L2 exceeds L1 by it.
    assert sizes.l1_tokens + talk.final_tokens <= sizes.l2_tokens
    assert sizes.l2_tokens < talk.working_set_tokens <= sizes.l3_tokens
    assert all(tokens % preset.page_tokens == 0 for tokens in (sizes.l1_tokens, sizes.l2_tokens))


def test_sizes_are_whole_pages():
    sizes = from_gigabytes(1.0, 2.0, 4.0, token_bytes=3000, page_tokens=64)
    assert sizes.l1_tokens == 333_312  # 333,333 of 3,000 bytes, in pages of 64
    assert scaled(sizes, 0.001, 3000, 16).l1_tokens == 336
    assert sizes.l2_ratio == pytest.approx(2.0, rel=1e-3)


def test_a_preset_has_either_a_rate_or_a_load():
    with pytest.raises(ConfigError, match="either qps or a load"):
        msgspec.structs.replace(GLM45.laptop, qps=1.0)


# --- arrivals


def test_arrivals_are_poisson_at_the_rate_asked_for():
    qps = 5.0
    talk = msgspec.structs.replace(TALK, sessions=200)
    turns = schedule(talk, qps, seed=1)
    gaps = [(after.timestamp - before.timestamp) / 1000 for before, after in pairwise(turns)]
    assert len(turns) == talk.requests
    assert fmean(gaps) == pytest.approx(1 / qps, rel=0.1)
    # Of an exponential distribution the deviation is the mean; a fixed rhythm has none.
    assert fmean((gap * qps - 1) ** 2 for gap in gaps) == pytest.approx(1.0, rel=0.2)


def test_every_session_has_every_round_in_order():
    turns = schedule(TALK, 5.0, seed=1)
    for session in range(TALK.sessions):
        assert [turn.round for turn in turns if turn.session == session] == list(range(TALK.rounds))


def test_another_seed_is_another_order_and_the_same_seed_is_the_same():
    assert schedule(TALK, 5.0, seed=1) == schedule(TALK, 5.0, seed=1)
    assert schedule(TALK, 5.0, seed=1) != schedule(TALK, 5.0, seed=2)


def test_a_session_is_not_due_before_it_has_thought():
    think_s = 30.0
    turns = schedule(msgspec.structs.replace(TALK, think_s=think_s), 5.0, seed=1)
    for session in range(TALK.sessions):
        due = [turn.timestamp / 1000 for turn in turns if turn.session == session]
        assert all(after - before >= think_s - 1e-6 for before, after in pairwise(due))


# --- sessions


def test_sessions_and_repeats_share_no_page_and_the_same_label_is_the_same():
    made = [speakers(TALK, None, label, TALK.sessions) for label in ("1.repeat-0", "1.repeat-1")]
    heads = {tuple(speaker.ask()[:16]) for half in made for speaker in half}
    assert len(heads) == 2 * TALK.sessions
    again = speakers(TALK, None, "1.repeat-0", 1)[0].ask()
    assert tuple(again[:16]) in heads
    assert len(again) == TALK.history_tokens + TALK.question_tokens


def test_random_tokens_stay_within_the_vocabulary():
    (speaker,) = speakers(TALK, None, "1", 1)
    assert 0 <= min(speaker.ask()) <= max(speaker.ask()) < TALK.vocabulary


def test_real_text_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        speakers(CHATBOT.laptop.conversations, None, "1", 1)


# --- systems


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        preset=GLM45.laptop,
        model="m",
        tp=1,
        logs=tmp_path,
        storage=tmp_path,
        ports=cycle(range(31000, 31010)),
    )


def test_systems_come_baseline_first_in_whatever_order_they_are_named():
    assert [system.name for system in choose("polarkv,hicache,radix", None)] == [
        "radix",
        "hicache",
        "polarkv",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("radix,vllm", "unknown system 'vllm'; there are radix, hicache"),
        ("radix,radix", "named twice"),
        ("mooncake", "no usable Mooncake|there is no"),
    ],
)
def test_a_wrong_list_of_systems_names_what_is_wrong(names, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        choose(names, tmp_path / "python")


def test_what_runs_already_need_not_be_installed(tmp_path):
    (mooncake,) = choose("mooncake", tmp_path / "python", running={"mooncake"})
    assert mooncake.name == "mooncake"


def test_by_default_everything_is_compared_that_can_be_run_here(tmp_path):
    names = [system.name for system in choose(None, tmp_path / "python")]
    assert names == ["radix", "hicache", "hicache-file", "polarkv", "polarkv-direct"]


def test_all_systems_get_the_same_l1_and_page_size_and_those_with_l2_the_same_ratio(setting):
    sizes = GLM45.laptop.tiers
    for name in ("radix", "hicache", "hicache-file", "polarkv"):
        line = SYSTEMS[name].plan(setting).engine.command_line()
        assert f"--max-total-tokens {sizes.l1_tokens} " in line
        assert "--page-size 16" in line
        assert (f"--hicache-ratio {sizes.l2_ratio:.4f}" in line) == (name != "radix")


def test_stores_get_the_same_capacity(setting):
    assert f'"max_size": {GLM45.laptop.tiers.l3_bytes}' in _line(setting, "hicache-file")
    (node,) = SYSTEMS["polarkv"].plan(setting).helpers
    assert f"--capacity {GLM45.laptop.tiers.l3_bytes}" in node.command_line()


def test_memory_nodes_that_run_already_are_used(setting):
    nodes = ("10.0.0.4:7411", "10.0.0.5:7411")
    plan = SYSTEMS["polarkv"].plan(replace(setting, nodes=nodes))
    assert plan.helpers == []
    assert "--polarkv-nodes 10.0.0.4:7411,10.0.0.5:7411" in plan.engine.command_line()


def _line(setting: Setting, name: str) -> str:
    return SYSTEMS[name].plan(setting).engine.command_line()
