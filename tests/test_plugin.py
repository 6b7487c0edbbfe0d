"""The plugin: nothing changes until asked, and whatever is wrong is said before a model is loaded."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache import registry
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from polarkv_sglang import compat, plugin
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.errors import ConfigError, IncompatibleSGLang

NODES = ("--polarkv-nodes", "127.0.0.1:7411")


@pytest.fixture(autouse=True)
def _disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins()
    monkeypatch.setattr(plugin, "_enabled", False)


def launch(*flags: str) -> ServerArgs:
    return prepare_server_args(["--model-path", "dummy", *flags])


def test_installed_but_not_enabled_changes_nothing(tmp_path: Path) -> None:
    arguments = launch()
    assert plugin.config_of(arguments) is None
    assert arguments.radix_cache_backend is None
    assert not arguments.enable_hierarchical_cache
    assert arguments.hicache_storage_backend is None
    from uuid import NAMESPACE_URL, uuid5

    assert LoRARef.deterministic_id("a", str(tmp_path)) == uuid5(NAMESPACE_URL, f"a\0{tmp_path}").hex


def test_enabled_it_is_hicaches_storage_and_keeps_hicaches_flags() -> None:
    arguments = launch(
        "--enable-polarkv",
        *NODES,
        "--hicache-ratio",
        "3",
        "--hicache-write-policy",
        "write_through_selective",
        "--hicache-storage-backend-extra-config",
        '{"prefetch_threshold": 64}',
    )
    assert arguments.radix_cache_backend == "polarkv"
    assert arguments.enable_hierarchical_cache
    assert arguments.hicache_storage_backend == "dynamic"
    assert (arguments.hicache_ratio, arguments.hicache_write_policy) == (3.0, "write_through_selective")
    extra = json.loads(arguments.hicache_storage_backend_extra_config or "")
    assert extra["prefetch_threshold"] == 64
    assert extra["hicache_storage_pass_prefix_keys"] is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("extra.json", '{"prefetch_threshold": 64, "mine": {"a": 1}}'),
        ("extra.toml", "prefetch_threshold = 64\n[mine]\na = 1\n"),
        ("extra.yaml", "prefetch_threshold: 64\nmine: {a: 1}\n"),
    ],
)
def test_hicaches_extra_config_may_be_a_file(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    arguments = launch("--enable-polarkv", *NODES, "--hicache-storage-backend-extra-config", f"@{file}")
    extra = json.loads(arguments.hicache_storage_backend_extra_config or "")
    assert (extra["prefetch_threshold"], extra["mine"], extra["backend_name"]) == (64, {"a": 1}, "polarkv")


def test_spill_mode_evict_writes_back() -> None:
    arguments = launch("--enable-polarkv", *NODES, "--polarkv-spill", "evict")
    assert arguments.hicache_write_policy == "write_back"


def test_direct_mode_is_a_linker_of_the_default_cache() -> None:
    arguments = launch("--enable-polarkv", *NODES, "--polarkv-mode", "direct")
    assert arguments.radix_cache_backend is None
    assert not arguments.enable_hierarchical_cache
    assert arguments.enable_unified_cache_external_linker
    assert arguments.unified_cache_external_linker_backend == "dynamic"
    assert plugin.config_of(arguments).mode == "direct"
    assert arguments.disable_overlap_schedule


@pytest.mark.parametrize(
    "flags",
    [
        ("--enable-hierarchical-cache",),
        ("--hicache-ratio", "3.0"),
        ("--hicache-storage-backend", "file"),
        ("--hicache-write-policy", "write_back"),
        ("--enable-unified-cache-external-linker",),
        ("--disaggregation-mode", "prefill"),
        ("--pp-size", "2"),
        ("--speculative-algorithm", "EAGLE"),
        ("--enable-streaming-session",),
        ("--enable-pdmux",),
        ("--dllm-algorithm", "LowConfidence"),
        ("--disable-radix-cache",),
        ("--polarkv-spill", "evict"),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_contradict_direct_mode_are_named_with_the_way_out(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        launch("--enable-polarkv", *NODES, "--polarkv-mode", "direct", *flags)
    said = capsys.readouterr().err
    named = " ".join(flags).removeprefix("--polarkv-")
    assert f"leave out --{named}" in said or f"leave out {named}" in said


def test_settings_travel_to_the_schedulers_and_the_token_is_not_printed() -> None:
    arguments = launch("--enable-polarkv", *NODES, "--polarkv-token", "s3cret")
    config = plugin.config_of(pickle.loads(pickle.dumps(arguments)))
    assert config == PolarConfig(nodes=("127.0.0.1:7411",), token="s3cret")
    assert "s3cret" not in repr(arguments)
    assert "s3cret" not in str(arguments.hicache_storage_backend_extra_config)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--polarkv-spill", "always"), "spill"),
        (("--polarkv-deadline", "soon"), "--polarkv-deadline: 'soon'"),
        (("--polarkv-nodes", "nowhere"), "nowhere"),
        (("--disable-radix-cache",), "--disable-radix-cache"),
        (("--hicache-storage-backend", "file"), "--hicache-storage-backend file"),
        (("--radix-cache-backend", "flexkv"), "flexkv"),
        (("--hicache-storage-backend-extra-config", "@x.json"), "@x.json: [Errno 2] No such file"),
        (("--hicache-storage-backend-extra-config", "{"), "extra-config {: Expecting property name"),
        (("--hicache-storage-backend-extra-config", '{"prefetch_threshold": "few"}'), "must be int, got str"),
        (("--polarkv-ucx-tls", "cma"), "ucx_tls 'cma': UCX transports 'cma' lack tcp"),
        (("--polarkv-ucx-library", "/nowhere/libucp.so.0"), "/nowhere/libucp.so.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "flexkv" in flags:
        registry._RADIX_CACHE_REGISTRY.setdefault("flexkv", lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        launch("--enable-polarkv", *NODES, *flags)
    assert exit_.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("polarkv: error:")]
    assert len(said) == 1
    assert named in said[0]


def test_an_unknown_variable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLARKV_DEADLNE", "1")
    with pytest.raises(SystemExit):
        launch("--enable-polarkv", *NODES)
    assert "POLARKV_DEADLNE is unknown" in capsys.readouterr().err


def test_an_sglang_without_a_surface_is_refused_by_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_surfaces(compat.ALL_SURFACES)
    monkeypatch.delattr(UnifiedRadixCache, "write_backup_storage")
    with pytest.raises(IncompatibleSGLang, match=r"SGLang 0\.5\.\d+ has no .*write_backup_storage"):
        compat.check_surfaces(compat.ENGINE_SURFACES)


@pytest.mark.parametrize(
    ("needed_by", "flags"),
    [
        ("ENGINE_SURFACES", ()),
        ("DIRECT_SURFACES", ("--polarkv-mode", "direct")),
        ("BLEND_SURFACES", ("--polarkv-blend",)),
    ],
)
def test_an_sglang_that_differs_for_its_schedulers_is_refused_before_there_are_any(
    needed_by: str,
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = compat.Surface("sglang.srt.managers.schedule_policy.PrefillAdder.add_two_reqs")
    monkeypatch.setattr(compat, needed_by, (*getattr(compat, needed_by), absent))
    with pytest.raises(SystemExit):
        launch("--enable-polarkv", *NODES, *flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"polarkv: error: SGLang \S+ has no {absent.path}, which PolarKV .*", said)


@pytest.mark.parametrize("asked", [True, False])
def test_an_sglang_that_the_plugin_does_not_fit_is_named_if_it_was_asked_for(
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delattr(registry, "register_radix_cache_backend")
    monkeypatch.setattr(sys, "argv", ["launch_server", *(["--enable-polarkv"] if asked else [])])
    expected = r"SGLang \S+ has no \S+\.register_radix_cache_backend, which PolarKV \S+ needs; .*0\.5\.23"
    if asked:
        with pytest.raises(SystemExit) as exit_:
            plugin.activate()
        assert exit_.value.code == 2
        assert re.match(f"polarkv: error: {expected}", capsys.readouterr().err)
    else:
        plugin.activate()
        assert re.search(f"PolarKV stays out: {expected}", caplog.text)


def test_an_sglang_with_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnifiedRadixCache, "_evict_device_leaf", lambda self, leaf: None)
    with pytest.raises(IncompatibleSGLang, match="_evict_device_leaf without node_id, tracker"):
        compat.check_surfaces(compat.ENGINE_SURFACES)


def test_a_hook_that_did_not_apply_is_found() -> None:
    compat.check_hooks({compat.TAKE_FLAGS: plugin._take_flags})
    with pytest.raises(IncompatibleSGLang, match="resolve_once"):
        compat.check_hooks({"sglang.srt.server_args.ServerArgs.resolve_once": plugin._take_flags})
    # One that another plugin has hooked, and we have not.
    with pytest.raises(IncompatibleSGLang, match="from_cli_args"):
        compat.check_hooks({compat.TAKE_FLAGS: plugin._add_flags})


def test_the_helper_for_engines_and_forks_takes_the_same_settings() -> None:
    arguments = plugin.server_args(
        model_path="dummy", polarkv={"nodes": ["127.0.0.1:7411"], "deadline": 2.0, "spill": "evict"}
    )
    assert plugin.config_of(arguments) == PolarConfig(
        nodes=("127.0.0.1:7411",), deadline_s=2.0, spill="evict"
    )
    assert arguments.radix_cache_backend == "polarkv"
    with pytest.raises(ConfigError, match="'deadlin' is unknown"):
        plugin.server_args(model_path="dummy", polarkv={"deadlin": 1})


def test_enabled_an_adapter_is_named_by_content(tmp_path: Path) -> None:
    launch("--enable-polarkv", *NODES)
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"1")
    first = LoRARef.deterministic_id("a", str(folder))
    assert LoRARef.deterministic_id("a", str(folder)) == first
    weights.write_bytes(b"2")
    assert LoRARef.deterministic_id("a", str(folder)) != first
    # What a name on a hub stands for cannot be known: never the same twice.
    assert LoRARef.deterministic_id("a", "org/name") != LoRARef.deterministic_id("a", "org/name")
