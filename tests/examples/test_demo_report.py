from __future__ import annotations

import json

import numpy as np

from examples.demo.report import Turn, median_interval, read_json, summary, table, write_json

KEYS = [
    "session", "turn", "phase", "prompt_tokens", "l1", "l2", "l3", "computed",
    "ttft_s", "l1_ttft_s", "plain_ttft_s", "outputs_equal",
]  # fmt: skip


def turn(**changes: object) -> Turn:
    values = {
        "session": "types", "turn": 4, "phase": "after_restart", "prompt_tokens": 3000,
        "l1": 0, "l2": 0, "l3": 2976, "computed": 24,
        "ttft_s": 0.5, "l1_ttft_s": 0.4, "plain_ttft_s": 5.0, "outputs_equal": True,
    }  # fmt: skip
    return Turn(**(values | changes))


def test_json_has_exactly_the_published_keys_and_reads_back(tmp_path):
    turns = [turn(phase="first", turn=1), turn(outputs_equal=False)]
    write_json(turns, tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [list(entry) for entry in written] == [KEYS, KEYS]
    assert read_json(tmp_path / "demo.json") == turns


def test_table_columns_line_up():
    lines = table([turn(), turn(session="string-methods", turn=12, plain_ttft_s=12.5)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    ends = [line.index(name) + len(name) for line, name in zip(lines[:1], ["speed-up"], strict=True)]
    assert all(line[ends[0] - 1] == "x" for line in lines[1:])


def test_table_shows_a_difference():
    same, different = table([turn(), turn(outputs_equal=False)]).splitlines()[1:]
    assert same.endswith("yes")
    assert different.endswith("NO")


def test_summary_compares_restored_turns_only():
    turns = [
        turn(phase="first", turn=3, l3=2900, ttft_s=100.0),
        turn(ttft_s=0.44),
        turn(l3=0, computed=3000, ttft_s=5.0),
    ]
    text = summary(turns, [1.0, 1.01, 1.5])
    assert "turn 4, after the restart: 1 of 2 restored" in text
    assert "TTFT of an L1 hit: median 1.10" in text
    assert "TTFT of plain / TTFT: median 11.4" in text
    assert "TTFT / TTFT of plain: median 1.010 of 3 interleaved pairs (1.000 to 1.500" in text


def test_summary_of_nothing_restored_says_so():
    assert "0 of 1 restored" in summary([turn(l3=0, computed=3000)], [])


def test_summary_keeps_a_turn_played_again_apart_from_the_next():
    turns = [turn(phase="first", turn=3), turn(turn=3, ttft_s=0.4), turn(turn=4, ttft_s=0.8)]
    again, following = summary(turns, []).split("turn 4,")
    assert "turn 3 again, after the restart: 1 of 1" in again
    assert "L1 hit: median 1.00" in again
    assert "L1 hit: median 2.00" in following


def test_interval_of_a_median_has_it_about_as_often_as_said():
    random = np.random.default_rng(7)
    for count in (10, 30, 101):
        intervals = [median_interval(random.lognormal(size=count)) for _ in range(2000)]
        covered = sum(low <= 1 <= high for low, high in intervals) / len(intervals)
        assert 0.93 < covered < 0.99
