"""Direct mode in process: KV between L1 and the pool, byte for byte, or a miss that is computed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from polarkv_sglang.config import PolarConfig
from polarkv_sglang.errors import TransportError
from polarkv_sglang.hicache import groups, linker
from polarkv_sglang.hicache.staging import Staged, Way
from polarkv_sglang.kernels.checksum import checksum_blocks
from polarkv_sglang.pool.blocks import Chain
from polarkv_sglang.pool.client import PoolClient
from tests.faults.nodes import FaultyNode
from tests.hicache.direct_harness import (
    a_direct_engine,
    abort_queued,
    direct_settings,
    wait_for_no_lease,
)
from tests.radix.harness import LAYERS, an_engine, prompt

IN_PLACE = Way(True, False, "a test")
STAGED = Way(False, False, "a test")
ON_DEVICE = Way(False, True, "a test")  # which here is the CPU
MODELS = [pytest.param(False, id="mha"), pytest.param(True, id="mla", marks=pytest.mark.slow)]


@pytest.fixture(params=["mapped", pytest.param("tcp", marks=pytest.mark.slow)])
def config(node: FaultyNode, request: pytest.FixtureRequest) -> PolarConfig:
    """Against a node whose slab is mapped, and one that puts what is read."""
    return direct_settings(node, ucx_tls="tcp" if request.param == "tcp" else None)


@pytest.mark.parametrize(("mla", "core"), [(False, "rust"), (True, "python")], ids=["mha", "mla"])
def test_a_prompt_comes_back_after_l1_is_lost(config: PolarConfig, mla: bool, core: str) -> None:
    with a_direct_engine(config, mla=mla, core=core) as engine:
        assert engine.serve(prompt(1, 256)) == (0, 0, 0)
        assert engine.serve(prompt(1, 256)) == (256, 0, 0)
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)
        engine.check_integrity()


def test_a_prefix_in_l1_is_continued_from_the_pool(node: FaultyNode) -> None:
    """With two nodes and short stripes, so that a block that is looked for in the wrong place is missed."""
    with (
        FaultyNode("64MiB").start() as other,
        a_direct_engine(direct_settings(node, other, stripe_pages=2)) as engine,
    ):
        engine.serve(prompt(1, 400))
        engine.forget()
        assert engine.serve(prompt(1, 80)) == (0, 0, 80)
        assert engine.serve(prompt(1, 208)) == (80, 0, 128)
        assert engine.serve(prompt(1, 400)) == (208, 0, 192)
        assert engine.serve(prompt(1, 400) + prompt(2, 48)) == (400, 0, 0)
        engine.check_integrity()


@pytest.mark.parametrize("mla", MODELS)
def test_engines_of_both_modes_read_what_the_other_wrote(node: FaultyNode, mla: bool) -> None:
    hicache = PolarConfig(nodes=(node.address,))
    with an_engine(hicache, mla=mla) as engine:
        engine.serve(prompt(1, 256))
        engine.settle()
    with a_direct_engine(direct_settings(node), mla=mla) as engine:
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)
        engine.serve(prompt(2, 256))
        engine.settle()
    with an_engine(hicache, mla=mla) as engine:
        assert engine.serve(prompt(2, 256)) == (0, 0, 256)


def choose(way: Way, patch: pytest.MonkeyPatch) -> None:
    """Have linkers take a way that they would on a GPU."""
    patch.setattr(linker, "choose_way", lambda pool, client: way)


@pytest.mark.parametrize("way", [STAGED, ON_DEVICE], ids=["host", "device"])
@pytest.mark.parametrize("mla", MODELS)
def test_blocks_that_are_staged_are_those_that_are_moved_in_place(
    config: PolarConfig,
    node: FaultyNode,
    mla: bool,
    way: Way,
    written: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with a_direct_engine(config, mla=mla) as engine:
        engine.serve(prompt(1, 256))
        engine.settle()
    choose(way, monkeypatch)
    with a_direct_engine(config, mla=mla) as engine:
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)
        engine.serve(prompt(2, 256))
        engine.forget()
        flip_a_byte(node, written, block=20)
        assert engine.serve(prompt(2, 256)) == (0, 0, 64), "a wrong block was not noticed"
        assert engine.recomputed == 1


def test_no_gpu_memory_is_registered_where_ucx_has_none(node: FaultyNode) -> None:
    client = PoolClient((node.address,), ucx_tls="tcp", gpu_memory=True)
    try:
        assert client.no_gpu_memory is not None
        assert "no CUDA memory" in client.no_gpu_memory
        with pytest.raises(TransportError, match="no CUDA memory"):
            client.register(1 << 40, 4096, cuda=True)
    finally:
        client.close()


@pytest.mark.parametrize("way", [IN_PLACE, STAGED, ON_DEVICE], ids=["in place", "host", "device"])
@pytest.mark.parametrize("mla", MODELS)
def test_layers_arrive_one_after_another(
    config: PolarConfig, mla: bool, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_LEAST_S", 0.0)  # groups of one layer
    choose(way, monkeypatch)
    with a_direct_engine(config, mla=mla) as engine:
        tokens = prompt(1, 256)
        engine.serve(tokens)
        engine.forget()
        for buffer in engine._buffers():
            buffer.fill_(-1.0)
        counter, states = engine.linker.layer_done_counter, []
        ahead = way is IN_PLACE and config.ucx_tls is not None  # the node puts a layer while one is told of
        complete = counter.complete

        def watch(index: int, layer: int) -> None:
            (slots,) = engine.cache.linker.private_load_indices.values()
            states.append([bool((buffer[slots] != -1.0).all()) for buffer in engine._buffers()[:LAYERS]])
            complete(index, layer)

        monkeypatch.setattr(counter, "complete", watch)
        assert engine.serve(tokens) == (0, 0, 256)
        assert len(states) == LAYERS
        for layer, there in enumerate(states):
            assert all(there[: layer + 1])
            assert ahead or not any(there[layer + 1 :])


def test_a_pass_that_does_not_wait_for_its_layers_is_computed_again(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        # As SGLang does for passes that it does not tell which layers to wait for.
        monkeypatch.setattr(engine.linker.layer_done_counter, "set_consumer", lambda index: None)
        assert engine.serve(prompt(1, 256)) == (0, 0, 0)
        assert engine.recomputed == 2, "then it is computed without asking"
        engine.check_integrity()


def test_a_pass_that_used_a_layer_of_a_wrong_block_is_dropped_for_all_its_requests(
    node: FaultyNode, written: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next loads are checked first: a node with bad memory must not have pass after pass dropped."""
    monkeypatch.setattr(linker, "_BATCHES_OF_DOUBT", 2)
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        beside = engine.request(prompt(2, 32))
        finish = engine.cache.finish_external_linker_loads
        failed: list[list[Req]] = []

        def finish_both(requests: list[Req]) -> list[Req]:
            failed.append(finish([*requests, beside]))
            return failed[-1]

        def serve_from_a_broken_block() -> list[Req]:
            """Those whose outputs were dropped at first; then nothing is wrong any more."""
            engine.forget()
            failed.clear()
            engine.serve(prompt(1, 256), before_load=lambda: flip_a_byte(node, written, block=9))
            assert failed[1] == []
            return failed[0]

        monkeypatch.setattr(engine.cache, "finish_external_linker_loads", finish_both)
        dropped = serve_from_a_broken_block()
        assert beside in dropped
        assert len(dropped) == 2
        dropped = serve_from_a_broken_block()
        assert beside not in dropped
        assert len(dropped) == 1
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256), "this is the second of two that came right"
        assert beside in serve_from_a_broken_block()


@pytest.mark.parametrize("loss", ["a flipped byte", "a dead node", "a frozen node"])
def test_what_is_lost_between_lookup_and_load_is_computed(
    config: PolarConfig, node: FaultyNode, loss: str, written: list[bytes]
) -> None:
    with a_direct_engine(config) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()

        def lose() -> None:
            if loss == "a dead node":
                node.kill()
            elif loss == "a frozen node":
                node.freeze()
            else:
                flip_a_byte(node, written, block=9)

        l1, _, l3 = engine.serve(prompt(1, 256), before_load=lose)
        mapped = config.ucx_tls is None
        if mapped and loss == "a dead node":
            assert l3 in (0, 256)  # a mapped slab outlives its node
        else:
            assert engine.recomputed == 1
            # Blocks before the broken one are used.
            assert (l1, l3) == ((0, 144) if loss == "a flipped byte" else (0, 0))
        if loss == "a frozen node":
            node.thaw()
        engine.check_integrity()


def test_a_load_that_is_late_in_its_middle_is_computed(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is frozen when the first layer of some megabytes has come."""
    monkeypatch.setattr(groups, "_LEAST_S", 0.0)
    with a_direct_engine(direct_settings(node, ucx_tls="tcp"), l1_tokens=5120, dtype=torch.float32) as engine:
        engine.serve(prompt(1, 4800))
        engine.forget()
        counter, arrived = engine.linker.layer_done_counter, []
        complete = counter.complete

        def freeze_at_the_first(index: int, layer: int) -> None:
            if not arrived:
                node.freeze()
            arrived.append(layer)
            complete(index, layer)

        monkeypatch.setattr(counter, "complete", freeze_at_the_first)
        assert engine.serve(prompt(1, 4800)) == (0, 0, 0)
        assert engine.recomputed == 1
        assert engine.linker._doubtful, "its pass has used the layers that came"
        node.thaw()
        engine.check_integrity()


def test_a_load_of_other_pages_than_were_found_is_refused(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        hashes = [f"{number:064x}" for number in range(4)]
        slots = torch.arange(4 * engine.cache.page_size)
        for wrong in ([*hashes[:3], "f" * 64], [*hashes, "f" * 64]):
            engine.linker.begin_lookup("a", hashes)
            assert not engine.linker.load("a", [PoolTransfer(PoolName.KV, keys=wrong, device_indices=slots)])


def test_a_gpu_whose_memory_ucx_refuses_is_staged_through_the_host(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(ON_DEVICE, monkeypatch)
    register, refusals = PoolClient.register, ["the GPU's memory does not fit its BAR"]

    def refuse(client: PoolClient, address: int, length: int, *, cuda: bool = False) -> None:
        if refusals:
            raise TransportError(refusals.pop())
        register(client, address, length, cuda=cuda)

    monkeypatch.setattr(PoolClient, "register", refuse)
    with a_direct_engine(direct_settings(node)) as engine:
        for each in (engine.linker._loader._passage, engine.linker._out):
            assert isinstance(each, Staged)
            assert each._checksums is None, "that is for memory that the processor cannot read"
        engine.serve(prompt(1, 256))
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)


def test_checksums_of_staged_blocks_are_those_of_their_rows(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        staged = Staged(engine.linker._pool, engine.runtime.client, on_device=True)
        staged._device.random_(0, 256)
        of_all = checksum_blocks(staged._device)
        for some in ([0, 1, 2], [3, 4], [5], [0, 2, 3], []):
            blocks = np.array(some, np.intp)
            assert staged._checksums_on_device(blocks).tolist() == of_all[blocks].tolist()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Keys of the blocks that were offered to a pool, in order."""
    keys: list[bytes] = []
    put = PoolClient.put

    def recorded(self: PoolClient, chain: Chain, *arguments: Any) -> Any:
        keys.extend(key for key in chain.keys if key not in keys)
        return put(self, chain, *arguments)

    monkeypatch.setattr(PoolClient, "put", recorded)
    return keys


def flip_a_byte(node: FaultyNode, written: list[bytes], block: int) -> None:
    if block < len(written):
        node.flip(written[block], 1000)


def test_a_request_whose_loads_fail_twice_is_computed_without_the_pool(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        engine.serve(prompt(1, 256))
        engine.forget()
        request = engine.queued(prompt(1, 256))
        assert engine.cache.match_prefix(engine.match_of(request)).host_hit_length == 256
        engine.cache.linker.failures[request] = 2
        assert engine.cache.match_prefix(engine.match_of(request)).host_hit_length == 0


def test_a_load_that_breaks_down_ends_and_its_pass_is_dropped(
    node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into slots that L1 does not have, which can be neither written nor zeroed."""
    choose(STAGED, monkeypatch)
    with a_direct_engine(direct_settings(node)) as engine:
        loads = engine.linker
        hashes = [f"{number:064x}" for number in range(4)]
        loads.lookup("a", [PoolTransfer(PoolName.KV, keys=hashes)])
        beyond = torch.arange(10**6, 10**6 + 4 * engine.cache.page_size)
        assert loads.load("a", [PoolTransfer(PoolName.KV, keys=hashes, device_indices=beyond)])
        index = loads.start_layer_wise_loading()
        landed = loads._started[index].landed.result(timeout=10)
        assert landed == ({"a": False}, True)
        loads.finish(index)
        # The next ones are served.
        engine.serve(prompt(1, 256))
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 256)


def test_nothing_of_other_weights_is_served_or_stored(node: FaultyNode) -> None:
    with a_direct_engine(direct_settings(node)) as engine:
        guard = engine.runtime.weights
        engine.serve(prompt(1, 256))
        guard.suspend()
        engine.cache.drain_storage()
        engine.weights = "weights B"
        guard.name()
        engine.serve(prompt(2, 256))  # between the update and the flush: under no name
        engine.forget()
        assert engine.serve(prompt(1, 256)) == (0, 0, 0)
        assert engine.serve(prompt(2, 256)) == (0, 0, 0)
        engine.forget()
        assert engine.serve(prompt(2, 256)) == (0, 0, 256)
        # Not even what was found under their name before.
        engine.forget()
        assert engine.serve(prompt(2, 256), before_load=guard.suspend) == (0, 0, 0)


def test_more_prompts_than_l1_holds_leak_nothing(node: FaultyNode, written: list[bytes]) -> None:
    """Random prefixes, aborts before the load, lost and broken blocks."""
    draw = random.Random(1)
    with a_direct_engine(direct_settings(node, ucx_tls="tcp"), l1_tokens=1024) as engine:
        from_pool = 0
        for step in range(150):
            tokens = prompt(draw.randrange(6), 16 * draw.randrange(1, 30))
            match draw.randrange(10):
                case 0:
                    abort_queued(engine, tokens)
                case 1:
                    engine.serve(tokens, before_load=lambda: flip_a_byte(node, written, draw.randrange(40)))
                case _:
                    from_pool += engine.serve(tokens)[2]
            if step % 10 == 0:
                engine.check_integrity()
        assert from_pool > 1000
        assert engine.recomputed > 0
        engine.check_integrity()
        wait_for_no_lease(node)
