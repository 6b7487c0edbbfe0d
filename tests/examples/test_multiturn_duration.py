from __future__ import annotations

from itertools import cycle

import msgspec
import pytest

from examples.multiturn.cli import _adjusted, _parser
from examples.multiturn.duration import fitting_rounds
from examples.multiturn.report import report
from examples.multiturn.runner import Runner
from examples.multiturn.scenarios import CHATBOT, GLM45
from examples.multiturn.systems import SYSTEMS, Setting
from tests.examples.streaming import streaming, tokens

ALL = [system for name, system in SYSTEMS.items() if name != "mooncake"]
LAPTOP = msgspec.structs.replace(CHATBOT.laptop, limit_s=600.0)


def fit(preset=LAPTOP, systems=ALL, *, spent_s: float = 30.0, start_s: float = 25.0, request_s: float) -> int:
    return fitting_rounds(preset, systems, spent_s=spent_s, start_s=start_s, request_s=request_s)


def test_a_fast_machine_plays_every_round_and_a_slow_one_has_time_for_none():
    assert fit(request_s=0.5) == LAPTOP.conversations.rounds == 10
    assert fit(request_s=60.0) < 1


def test_slower_requests_and_starts_and_more_systems_leave_fewer_rounds():
    usual = fit(request_s=6.5)
    assert 2 < usual < 10
    assert fit(request_s=9.0) < usual
    assert fit(request_s=6.5, start_s=60.0) < usual
    assert fit(request_s=6.5, systems=[*ALL, SYSTEMS["mooncake"]]) < usual
    assert fit(request_s=6.5, systems=ALL[-1:]) == 10


@pytest.mark.parametrize("request_s", [5.0, 6.5, 8.0, 10.0])
def test_what_fits_ends_in_time_and_one_round_more_would_not(request_s):
    """Of five systems two compute every turn, and three the first round and half of every later one."""
    spent_s, start_s = 30.0, 25.0
    sessions = LAPTOP.conversations.sessions

    def run_s(rounds: int) -> float:
        turns = sessions * (2 * rounds + 3 * (1 + (rounds - 1) / 2))
        beside = 4 * 0.125 + 3 * 1.2  # shorter requests to warm up, and what is asked again
        return spent_s + 4 * start_s + (turns + beside) * request_s

    rounds = fit(request_s=request_s)
    assert LAPTOP.limit_s is not None
    assert run_s(rounds) <= LAPTOP.limit_s < run_s(rounds + 1)


def test_without_a_limit_every_round_is_played():
    assert fit(msgspec.structs.replace(LAPTOP, limit_s=None), request_s=60.0) == 10


@pytest.mark.parametrize(
    ("limit_s", "least_rounds", "rounds"), [(0.001, 1, 1), (0.001, 2, 2), (3600.0, 1, 3), (0.001, None, 3)]
)
def test_a_run_plays_what_fits_and_reports_it(limit_s, least_rounds, rounds, tmp_path):
    talk = msgspec.structs.replace(GLM45.laptop.conversations, sessions=2, rounds=3, history_tokens=64)
    preset = msgspec.structs.replace(
        GLM45.laptop, conversations=talk, limit_s=limit_s, min_rounds=least_rounds, repeats=1, load=50.0
    )
    setting = Setting(
        preset=preset, model="m", tp=1, logs=tmp_path, storage=tmp_path, ports=cycle(range(31000, 31010))
    )
    with streaming(lambda prompt: [tokens(sum(prompt) % 500)]) as server:
        runner = Runner(
            GLM45, preset, [SYSTEMS["radix"]], setting, repeats=1, seed=1, urls={"radix": server.url}
        )
        results = runner.run()
    (played,) = results.plays["radix"]
    assert len(played.answers) == 2 * rounds
    assert report(GLM45, results, []).rounds == rounds


@pytest.mark.parametrize(
    ("arguments", "cut"),
    [
        ([], True),
        (["--qps", "1"], False),
        (["--rounds", "4"], False),
        (["--repeats", "1"], False),
        (["--base-url", "radix=http://127.0.0.1:1"], False),
    ],
)
def test_who_asks_for_a_size_or_a_rate_gets_all_rounds(arguments, cut):
    preset = _adjusted(CHATBOT.laptop, _parser(CHATBOT).parse_args(arguments))
    assert (preset.min_rounds is not None) == cut
