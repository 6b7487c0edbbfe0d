"""The scripts' command line: what it refuses before anything starts, and a whole run on running servers."""

from __future__ import annotations

import json
import re
import time

import pytest
from msgspec.structs import replace

from examples.multiturn.cli import main
from examples.multiturn.presets import Scenario
from examples.multiturn.scenarios import CHATBOT, GLM45
from tests.examples.streaming import Event, streaming, tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "vllm"], "unknown system 'vllm'"),
        (["--preset", "huge"], "invalid choice"),
        (["--repeats", "0"], "--repeats 0 is below 1"),
        (["--sessions", "-1"], "--sessions -1 is below 1"),
        (["--rounds", "100"], "L1 holds 3248; play fewer rounds"),
        (["--qps", "0"], "--qps 0.0 is not above 0"),
        (["--qps", "nan"], "--qps nan is not above 0"),
        (["--nodes", "10.0.0.4"], "not host:port"),
        (["--base-url", "http://127.0.0.1:1"], "write SYSTEM=http://HOST:PORT"),
        (["--base-url", "radix=127.0.0.1:1"], "write SYSTEM=http://HOST:PORT"),
        (["--base-url", "radix=http://a", "--base-url", "radix=http://b"], "names radix twice"),
        (["--systems", "radix", "--base-url", "polarkv=http://a"], "which --systems leaves out"),
        (["--json", "no/such/folder/run.json"], "there is no folder no/such/folder"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(GLM45, [*arguments, "--logs", str(tmp_path / "logs")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def same(prompt: list[int]) -> list[Event]:
    """As greedy as a model: an answer that follows from the prompt."""
    first, second = sum(prompt) % 500, len(prompt) % 500
    history_tokens = GLM45.laptop.conversations.history_tokens
    known = history_tokens if len(prompt) > history_tokens + 16 else 0
    details = {"device": 0, "host": 0, "storage": known}
    return [tokens(first), tokens(first, second, cached_tokens_details=details)]


def other(prompt: list[int]) -> list[Event]:
    return [tokens(3, 4)]


def run(
    tmp_path, answer_of_polarkv, *more: str, scenario: Scenario = GLM45
) -> tuple[int, list[dict[str, object]]]:
    small = ["--sessions", "3", "--rounds", "2", "--qps", "50"]
    with streaming(same) as radix, streaming(answer_of_polarkv) as polarkv:
        urls = ["--base-url", f"radix={radix.url}", "--base-url", f"polarkv={polarkv.url}"]
        paths = ["--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")]
        status = main(scenario, [*small, *urls, *paths, *more])
    same_prompts = set(map(tuple, polarkv.prompts)) <= set(map(tuple, radix.prompts))
    assert same_prompts == (answer_of_polarkv is same)
    return status, json.loads((tmp_path / "run.json").read_text())


def test_running_servers_are_compared_and_the_figures_written(tmp_path, capsys):
    status, objects = run(tmp_path, same)
    assert status == 0
    assert [each["system"] for each in objects] == ["radix", "polarkv"]
    assert [(each["requests"], each["failed"], each["outputs_equal"]) for each in objects] == [
        (12, 0, True),
        (12, 0, True),
    ]
    assert objects[1]["hit_tokens"]["l3"] > 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    details = json.loads((tmp_path / "run.details.json").read_text())
    assert details["qps"] == 50
    assert details["systems"][1]["ttft_ratio"]["radix"]["repeats"] == 2
    shown = capsys.readouterr().out
    assert "3 sessions of 2 rounds after 2512 tokens of history: 7680 tokens in the end; L1 3248," in shown
    assert "arrivals: 50 requests/s, 12.500 of the published 4" in shown
    assert re.search(r"PolarKV +\|", shown)
    assert "mean TTFT at least 2.1x lower than radix cache only" in shown


def test_a_laptop_begins_no_repeat_that_would_outlast_its_limit_unless_it_is_asked_for(tmp_path, capsys):
    hurried = replace(GLM45, laptop=replace(GLM45.laptop, limit_s=0.001))
    for more, repeats in (((), 1), (("--repeats", "2"), 2)):
        status, objects = run(tmp_path, same, *more, scenario=hurried)
        assert status == 0
        assert [each["requests"] for each in objects] == [6 * repeats] * 2
        assert ("1 of 2 repeats fit in the time" in capsys.readouterr().out) == (repeats == 1)


def test_other_greedy_text_than_the_baselines_fails_the_run(tmp_path, capsys):
    status, objects = run(tmp_path, other)
    assert status == 1
    assert [each["outputs_equal"] for each in objects] == [True, False]
    assert "greedy outputs differ: polarkv, repeat 0, session" in capsys.readouterr().err


def test_conversations_that_an_earlier_run_left_in_a_cache_fail_the_run(tmp_path, capsys):
    def remembers(prompt: list[int]) -> list[Event]:
        return [tokens(3, 4, cached_tokens_details={"device": 0, "host": 0, "storage": 16})]

    with streaming(remembers) as server:
        arguments = ["--base-url", f"polarkv={server.url}", "--qps", "50", "--sessions", "2", "--rounds", "1"]
        paths = ["--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")]
        assert main(GLM45, [*arguments, *paths]) == 1
    assert "32 tokens of fresh conversations in its caches" in capsys.readouterr().err


def test_a_server_that_answers_nothing_fails_the_run(tmp_path, capsys):
    # Less than a history is a warm-up.
    history_tokens = GLM45.laptop.conversations.history_tokens
    with streaming(lambda prompt: [tokens(1)] if len(prompt) < history_tokens else 500) as server:
        status = main(
            GLM45,
            [
                *("--base-url", f"radix={server.url}", "--qps", "50", "--sessions", "2", "--rounds", "1"),
                *("--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")),
            ],
        )
    assert status == 1
    assert "every request to radix cache only failed" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_real_text_without_a_tokenizer_is_refused_before_anything_is_asked(tmp_path, capsys):
    with streaming(same) as server:
        arguments = ["--base-url", f"radix={server.url}", "--model", str(tmp_path)]
        paths = ["--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")]
        assert main(CHATBOT, [*arguments, *paths]) == 1
    assert "tokenizer.json" in capsys.readouterr().err
    assert server.prompts == []


def test_more_rounds_than_there_are_questions_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(CHATBOT, ["--rounds", "11"])
    assert "11 rounds of real text are more than its 10 questions" in capsys.readouterr().err


def test_without_a_rate_arrivals_follow_from_what_this_machine_answers(tmp_path):
    def computes(prompt: list[int]) -> list[Event]:
        time.sleep(0.2)
        return [tokens(1, 2)]

    with streaming(computes) as server:
        arguments = [
            "--base-url",
            f"radix={server.url}",
            "--sessions",
            "2",
            "--rounds",
            "1",
            "--repeats",
            "1",
        ]
        paths = ["--json", str(tmp_path / "run.json"), "--logs", str(tmp_path / "logs")]
        assert main(GLM45, [*arguments, *paths]) == 0
    details = json.loads((tmp_path / "run.details.json").read_text())
    assert details["request_s"] >= 0.2
    assert details["qps"] == pytest.approx(GLM45.laptop.load / details["request_s"])
