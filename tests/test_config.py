"""Settings: file < environment < flags, and whatever is wrong is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.config import (
    SETTINGS,
    PolarConfig,
    add_flags,
    build_config,
    format_bytes,
    from_flags,
    load_config,
    parse_address,
    parse_bytes,
)
from polarkv_sglang.errors import ConfigError


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(flags)


def test_defaults_need_nothing() -> None:
    assert from_flags(parsed("--enable-polarkv"), environ={}) == PolarConfig()


def test_a_flag_beats_a_variable_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "polarkv.toml"
    file.write_text('spill = "evict"\ndeadline = 2.0\nstripe_pages = 8\ncapacity = "1GiB"\n')
    environ = {"POLARKV_DEADLINE": "3.0", "POLARKV_STRIPE_PAGES": "16", "POLARKV_CONFIG": str(file)}
    config = from_flags(parsed("--polarkv-stripe-pages", "64"), environ=environ)
    assert (config.spill, config.deadline_s, config.stripe_pages) == ("evict", 3.0, 64)
    assert config.capacity_bytes == 2**30
    other = tmp_path / "other.toml"
    other.write_text("deadline = 4.0\n")
    assert from_flags(parsed("--polarkv-config", str(other)), environ={}).deadline_s == 4.0


NODES = {"nodes": ("10.0.0.4:7411,10.0.0.5:7411", '["10.0.0.4:7411", "10.0.0.5:7411"]')}
NODES_FILE = {"nodes_file": ("/etc/polarkv/nodes", '"/etc/polarkv/nodes"')}


@pytest.mark.parametrize(("given", "left_out"), [(NODES, NODES_FILE), (NODES_FILE, NODES)])
def test_every_setting_is_a_flag_a_variable_and_a_key(
    tmp_path: Path, given: dict[str, tuple[str, str]], left_out: dict[str, tuple[str, str]]
) -> None:
    values = {
        **given,
        "copies": ("2", "2"),
        "capacity": ("8GiB", '"8GiB"'),
        "token": ("secret", '"secret"'),
        "mode": ("hicache", '"hicache"'),
        "spill": ("evict", '"evict"'),
        "deadline": ("0.5", "0.5"),
        "stripe_pages": ("16", "16"),
        "spill_watermark": ("0.5", "0.5"),
        "blend": ("all", '"all"'),
        "blend_ratio": ("0.2", "0.2"),
        "blend_check_layer": ("2", "2"),
        "blend_stages": ("4:0.1", '"4:0.1"'),
        "blend_metric": ("kv", '"kv"'),
        "blend_strategy": ("first", '"first"'),
        "blend_chunk_tokens": ("64", "64"),
        "blend_min_tokens": ("512", "512"),
        "blend_index_tokens": ("1048576", "1048576"),
        "blend_arena": ("64MiB", '"64MiB"'),
        "blend_gate": ("none", '"none"'),
        "blend_verdicts": ("/etc/polarkv", '"/etc/polarkv"'),
        "ucx_library": ("/opt/ucx/libucp.so.0", '"/opt/ucx/libucp.so.0"'),
        "ucx_tls": ("tcp,cma", '"tcp,cma"'),
        "tls_cert": ("/etc/polarkv/cert.pem", '"/etc/polarkv/cert.pem"'),
        "tls_key": ("/etc/polarkv/key.pem", '"/etc/polarkv/key.pem"'),
        "tls_ca": ("/etc/polarkv/ca.pem", '"/etc/polarkv/ca.pem"'),
    }
    assert set(values) | set(left_out) == set(SETTINGS)
    flags = [
        part for name, (text, _) in values.items() for part in (f"--polarkv-{name.replace('_', '-')}", text)
    ]
    by_flag = from_flags(parsed(*flags), environ={})
    by_variable = load_config(environ={f"POLARKV_{name.upper()}": text for name, (text, _) in values.items()})
    file = tmp_path / "all.toml"
    file.write_text("".join(f"{name} = {toml}\n" for name, (_, toml) in values.items()))
    by_file = load_config(file=str(file))
    assert by_flag == by_variable == by_file != PolarConfig()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--polarkv-spill", "always"], "spill"),
        (["--polarkv-deadline", "soon"], "--polarkv-deadline"),
        (["--polarkv-deadline", "0"], "deadline"),
        (["--polarkv-deadline", "nan"], "deadline"),
        (["--polarkv-deadline", "6"], "deadline 6.0 is out of range"),
        (["--polarkv-nodes", "10.0.0.4"], "10.0.0.4"),
        (["--polarkv-nodes", "h:99999"], "h:99999"),
        (["--polarkv-nodes", "a:1,a:1"], "twice"),
        (["--polarkv-nodes", ""], "--polarkv-nodes: '': no memory node is named"),
        (["--polarkv-nodes", " , "], "no memory node is named; leave it out"),
        (["--polarkv-nodes", "a:1", "--polarkv-nodes-file", "/etc/nodes"], "both given"),
        (["--polarkv-copies", "4"], "copies 4"),
        (["--polarkv-capacity", "much"], "much"),
        (["--polarkv-capacity", "1MiB"], "16 MiB"),
        (["--polarkv-stripe-pages", "0"], "stripe_pages"),
        (["--polarkv-spill-watermark", "1.5"], "spill_watermark"),
        (["--polarkv-blend", "yes"], "blend"),
        (["--polarkv-blend-ratio", "1.5"], "blend_ratio 1.5"),
        (["--polarkv-blend-check-layer", "0"], "blend_check_layer 0"),
        (["--polarkv-blend-stages", "1:0.1"], "blend_stages"),
        (["--polarkv-blend-chunk-tokens", "4"], "blend_chunk_tokens 4"),
        (["--polarkv-mode", "direct", "--polarkv-spill", "evict"], "leave out spill evict"),
        (["--polarkv-mode", "direct", "--polarkv-blend", "all"], "blend all needs mode hicache"),
        (["--polarkv-token", ""], "token"),
        (["--polarkv-config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_wrong_value_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        from_flags(parsed(*flags), environ={})


def test_an_unknown_variable_or_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="POLARKV_NODE is unknown"):
        load_config(environ={"POLARKV_NODE": "a:1"})
    file = tmp_path / "typo.toml"
    file.write_text("deadlin = 1\n")
    with pytest.raises(ConfigError, match="'deadlin' is unknown"):
        load_config(file=str(file))
    with pytest.raises(ConfigError, match="'deadlin' is unknown"):
        build_config({"deadlin": 1})
    file.write_text("deadline = \n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(file=str(file))
    file.write_text('deadline = ["1"]\n')
    with pytest.raises(ConfigError, match="deadline"):
        load_config(file=str(file))


def test_an_empty_list_of_nodes_is_not_taken_for_none(tmp_path: Path) -> None:
    for text in ("", ","):
        with pytest.raises(ConfigError, match=f"POLARKV_NODES: '{text}': no memory node is named"):
            load_config(environ={"POLARKV_NODES": text})
    file = tmp_path / "polarkv.toml"
    file.write_text("nodes = []\n")
    with pytest.raises(ConfigError, match="nodes: no memory node is named"):
        load_config(file=str(file))
    with pytest.raises(ConfigError, match="nodes: no memory node is named"):
        build_config({"nodes": []})


def test_variables_of_other_parts_are_left_alone() -> None:
    environ = {"POLARKV_RUNTIME_DIR": "/run/x", "POLARKV_CPU_PLATFORM": "0", "PATH": "/bin"}
    assert load_config(environ=environ) == PolarConfig()


@given(st.integers(0, 2**50))
def test_a_plain_number_is_bytes(count: int) -> None:
    assert parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("1.5 gb", 1.5e9), ("64K", 64000), ("2tib", 2 * 2**40), ("7 B", 7)],
)
def test_sizes_have_units(text: str, count: float) -> None:
    assert parse_bytes(text) == count


def test_sizes_are_shown_in_binary_units() -> None:
    assert [format_bytes(n) for n in (512, 2048, 3 * 2**30)] == ["512 B", "2.0 KiB", "3.0 GiB"]


def test_addresses_may_be_ipv6() -> None:
    assert parse_address("[::1]:7411") == ("::1", 7411)
    assert parse_address("node-4.cluster:7411") == ("node-4.cluster", 7411)


def test_the_flag_for_blending_alone_lets_requests_ask() -> None:
    assert from_flags(parsed("--polarkv-blend"), environ={}).blend == "ask"
    assert from_flags(parsed(), environ={}).blend == "off"
