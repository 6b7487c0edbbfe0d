"""Forks that build their caches themselves: KV is shared only while updates of the weights are followed.

Weights are changed through SGLang's own updater class, as its scheduler has it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs
from transformers import PretrainedConfig

from polarkv_sglang import runtime as runtime_module
from polarkv_sglang.config import PolarConfig
from polarkv_sglang.engine import attach
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.hicache.linker import PolarLinker
from polarkv_sglang.radix import PolarRadixCache
from polarkv_sglang.radix.direct import DirectRadixCache
from polarkv_sglang.runtime import current_runtime
from polarkv_sglang.weight_updates import follow_updates
from tests.hicache.direct_harness import DirectEngine
from tests.radix.harness import Engine, prompt
from tests.support import RunningNode, running_node


class Runner:
    """What SGLang's updater and we use of a model runner. A path is a number: that of all weights."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(8, 8)
        self.model_config = SimpleNamespace(hf_config=PretrainedConfig())
        self.weight_updater = self
        self.update_weights_from_disk("1", None, recapture_cuda_graph=False)

    def update_weights_from_disk(
        self, path: str, load_format: str | None, *, recapture_cuda_graph: bool
    ) -> tuple[bool, str]:
        with torch.no_grad():
            self.model.weight.fill_(float(path))
        return True, "updated"


class Fork(Engine):
    """With a cache that was built as the README says; settings come from POLARKV_*."""

    attached = True

    def _make_cache(
        self, arguments: ServerArgs, params: CacheInitParams, policy: object
    ) -> UnifiedRadixCache:
        runtime_module._runtime = None
        self.runner = Runner()
        cache = self._build(arguments, params)
        self.runtime = current_runtime()
        if self.attached:
            attach(cache, self.runner)
        return cache

    def _build(self, arguments: ServerArgs, params: CacheInitParams) -> UnifiedRadixCache:
        cache = PolarRadixCache(params)
        cache.init_hicache(arguments, params)
        return cache

    def updater(self) -> SchedulerWeightUpdaterManager:
        scheduler = SimpleNamespace(
            tree_cache=self.cache, _engine_paused=False, record_weight_version_change=lambda new_version: None
        )
        with get_parallel().override(tp_group=SimpleNamespace(cpu_group=None, world_size=1)):
            return SchedulerWeightUpdaterManager(
                tp_worker=SimpleNamespace(weight_update_runners=lambda: [("target", self.runner)]),
                draft_worker=None,
                memory_saver_adapter=None,
                flush_cache=self._flush,
                is_fully_idle=lambda ignore_waiting: True,
                scheduler=scheduler,
            )

    def update(self, path: str, *, flush: bool = True) -> None:
        request = UpdateWeightFromDiskReqInput(model_path=path, flush_cache=flush)
        assert self.updater().update_weights_from_disk(request).success

    def _flush(self, empty_cache: bool) -> bool:
        self.cache.reset()
        self.allocator.clear()
        return True


class LateFork(Fork):
    attached = False


class BindingFork(LateFork):
    """Binds its model to the runtime and does nothing else."""

    def _build(self, arguments: ServerArgs, params: CacheInitParams) -> UnifiedRadixCache:
        cache = super()._build(arguments, params)
        current_runtime().bind_model(self.runner)
        return cache


class StorageFork(Fork):
    """SGLang's own cache, with PolarStorage as HiCache's storage."""

    def _build(self, arguments: ServerArgs, params: CacheInitParams) -> UnifiedRadixCache:
        cache = UnifiedRadixCache(params)
        cache.init_hicache(arguments, params)
        return cache


class DirectFork(Fork, DirectEngine):
    def _build(self, arguments: ServerArgs, params: CacheInitParams) -> UnifiedRadixCache:
        cache = DirectRadixCache(params)
        cache.init_cache_linker(PolarLinker(arguments, params, components=set(cache.components)))
        return cache


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with running_node("64MiB") as running:
        yield running


@pytest.fixture
def config(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> PolarConfig:
    monkeypatch.setenv("POLARKV_NODES", node.address)
    return PolarConfig(nodes=(node.address,))


def sharing(engine: Fork, tokens: list[int]) -> int:
    """Tokens of a prompt that come from the pool once the engine has computed it and lost L1 and L2."""
    engine.serve(tokens)
    engine.forget()
    return engine.serve(tokens)[2]


@pytest.mark.parametrize("kind", [Fork, BindingFork, DirectFork])
def test_after_an_update_old_kv_is_not_served_and_new_kv_is_shared(
    kind: type[Fork], config: PolarConfig
) -> None:
    tokens = prompt(2, 256)
    with closing(kind(config)) as engine:
        assert sharing(engine, tokens) == 256
        engine.update("2")
        assert engine.serve(tokens) == (0, 0, 0)
        engine.forget()
        assert engine.serve(tokens) == (0, 0, 256)
        # Named by content: the first weights find their KV again.
        engine.update("1")
        assert engine.serve(tokens) == (0, 0, 256)


def test_after_an_update_without_a_flush_nothing_is_shared_until_there_was_one(
    config: PolarConfig, node: RunningNode
) -> None:
    with closing(Fork(config)) as engine:
        engine.serve(prompt(3, 256))
        engine.update("3", flush=False)
        before = node.statistics().commits_total
        engine.serve(prompt(4, 256))
        engine.settle()
        assert node.statistics().commits_total == before
        engine.forget()
        assert sharing(engine, prompt(4, 256)) == 256


def test_below_another_cache_nothing_is_shared_any_more_after_an_update(
    config: PolarConfig, node: RunningNode, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(5, 256)
    with closing(StorageFork(config)) as engine, caplog.at_level(logging.WARNING, "polarkv_sglang"):
        assert sharing(engine, tokens) == 256
        before = node.statistics().commits_total
        engine.update("2")
        assert sharing(engine, tokens) == 0
        # Not even where the weights are those of the KV.
        engine.update("1")
        assert sharing(engine, tokens) == 0
        assert node.statistics().commits_total == before
    assert caplog.text.count("KV stays local from now on") == 1


def test_nothing_is_shared_before_a_model_is_attached(config: PolarConfig, node: RunningNode) -> None:
    tokens = prompt(6, 256)
    with closing(LateFork(config)) as engine:
        before = node.statistics().commits_total
        assert sharing(engine, tokens) == 0
        assert node.statistics().commits_total == before


def test_a_cache_is_attached_once_and_before_there_is_an_updater(config: PolarConfig) -> None:
    """The dispatcher of a scheduler that is there already calls the updater without our hooks."""
    with closing(LateFork(config)) as engine:
        updater = engine.updater()
        follow_updates.cache_clear()
        with pytest.raises(ConfigError, match="has made its weight updater already"):
            attach(engine.cache, engine.runner)
        assert sharing(engine, prompt(7, 256)) == 0
        del updater
        gc.collect()
        attach(engine.cache, engine.runner)
        assert sharing(engine, prompt(8, 256)) == 256
        with pytest.raises(ConfigError, match="attach one cache, once"):
            attach(engine.cache, engine.runner)
