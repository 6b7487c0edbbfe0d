"""What users meet: servers that blend prompts which ask for it, and never share what they blended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from examples.common import tiny_models
from tests.engine.servers import Server, prompt, running_server
from tests.pool.test_embedded import eventually, is_gone
from tests.support import RunningNode, running_node

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

HEAD, ONE, TWO, QUESTION = prompt(3, 37), prompt(1, 300), prompt(2, 250), prompt(4, 20)
FLAGS = (
    "--polarkv-blend",
    "--polarkv-blend-min-tokens",
    "64",
    "--polarkv-blend-gate",
    "none",
    "--chunked-prefill-size",
    "256",
    "--polarkv-capacity",
    "256MiB",
)
# With more threads than cores, those of small operations wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Answer(NamedTuple):
    output_ids: list[int]
    cached_tokens: int
    sources: dict[str, int]


@pytest.fixture(scope="module")
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded memory node is found: not where this user's own engines look for one."""
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["TP=1", "TP=2"])
def server(
    request: pytest.FixtureRequest, runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Without a pool address: with an embedded memory node."""
    folder = tmp_path_factory.mktemp("blending")
    model = tiny_models.build("llama", folder / "llama", dtype=torch.float32)
    flags = (*FLAGS, "--tp", str(request.param))
    environment = ONE_THREAD | {"POLARKV_RUNTIME_DIR": str(runtime_folder)}
    with running_server(model, folder / "server.log", *flags, environment=environment) as running:
        yield running


def ask(server: Server, tokens: list[int], *, request: dict[str, Any] | None = None, **custom: Any) -> Answer:
    parameters = {"temperature": 0, "max_new_tokens": 8, "custom_params": custom or None}
    reply = server.post("/generate", input_ids=tokens, sampling_params=parameters, **(request or {}))
    meta: Any = reply["meta_info"]
    sources = meta["polarkv"]
    parts = ("l1", "l2", "l3", "l4", "blended", "computed")
    assert sum(sources[part] for part in parts) == sources["prompt"] == len(tokens)
    return Answer(list(reply["output_ids"]), meta["cached_tokens"], sources)  # type: ignore[call-overload]


def test_a_prompt_of_known_documents_is_blended_and_leaves_no_trace(server: Server) -> None:
    ask(server, HEAD + ONE + TWO)
    asked = HEAD + TWO + ONE + QUESTION
    known, prefix = len(ONE + TWO), 32
    whole = ask(server, asked, polarkv_blend=True, polarkv_blend_ratio=1.0)
    assert whole.sources["blended"] == 0
    assert whole.sources["recomputed"] >= known - 3  # the last row of each pass is computed anyway
    partly = ask(server, asked, polarkv_blend=True)
    assert partly.sources["recomputed"] == pytest.approx(0.15 * known, abs=3)
    assert partly.sources["blended"] == pytest.approx(0.85 * known, abs=3)
    # Neither is a prefix for anyone: this one is computed, and says the same as ratio 1 did.
    exact = ask(server, asked)
    assert exact.cached_tokens == prefix
    assert (exact.sources["blended"], exact.sources["recomputed"]) == (0, 0)
    assert exact.output_ids == whole.output_ids
    # The exact one is.
    assert ask(server, asked).cached_tokens == (len(asked) - 1) // 16 * 16


def test_blended_kv_reaches_neither_host_memory_nor_pool(server: Server) -> None:
    ask(server, prompt(21, 300) + prompt(22, 300))
    asked = prompt(22, 300) + prompt(21, 300) + prompt(23, 20)
    blended = ask(server, asked, polarkv_blend=True)
    assert blended.sources["blended"] > 300
    # Once what was asked later is in the pool, whatever was to be written of it is there, too.
    later = prompt(24, 300)
    server.generate(later)
    server.generate_from_pool(later, 288)
    exact = ask(server, asked)
    assert exact.cached_tokens == 0
    assert exact.sources["blended"] == 0


def test_requests_that_cannot_be_blended_are_answered_in_full(server: Server) -> None:
    ask(server, prompt(31, 300) + prompt(32, 300))
    asked = prompt(32, 300) + prompt(31, 300) + prompt(33, 20)
    logprobs = {"return_logprob": True, "logprob_start_len": 0}
    assert ask(server, asked, request=logprobs, polarkv_blend=True).sources["blended"] == 0
    asked = prompt(32, 300) + prompt(31, 299) + prompt(34, 20)
    assert ask(server, asked, polarkv_blend=True, polarkv_blend_ratio="many").sources["blended"] == 0


def blended_tokens(server: Server) -> float:
    """Of all requests so far, by the engine's metrics."""
    lines = server.get("/metrics").splitlines()
    names = ("polarkv_prompt_tokens_total{", 'source="blended"')
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(name in line for name in names))


def test_openai_requests_are_blended_within_their_spans(server: Server) -> None:
    ask(server, HEAD + prompt(111, 300) + prompt(112, 250))
    asked = HEAD + prompt(112, 250) + prompt(111, 300) + QUESTION
    before = blended_tokens(server)
    custom = {"polarkv_blend": True, "polarkv_blend_ratio": 0, "polarkv_blend_spans": [100, 180, 300, 340]}
    reply = server.post(
        "/v1/completions", model="any", prompt=asked, max_tokens=4, temperature=0, custom_params=custom
    )
    assert reply["usage"]["completion_tokens"] == 4  # type: ignore[index]
    assert blended_tokens(server) - before == 80 + 40
    assert ask(server, asked).cached_tokens == 32, "the blended one is no prefix"


def test_documents_that_left_l1_are_blended_from_l2(server: Server) -> None:
    ask(server, HEAD + prompt(41, 400) + prompt(42, 400))
    asked = HEAD + prompt(42, 400) + prompt(41, 400) + QUESTION
    for seed in range(50, 58):
        ask(server, prompt(seed, 600))
    whole = ask(server, asked, polarkv_blend=True, polarkv_blend_ratio=1.0)
    assert whole.sources["recomputed"] > 700
    for seed in range(60, 68):
        ask(server, prompt(seed, 600))
    partly = ask(server, asked, polarkv_blend=True)
    assert partly.sources["blended"] > 600
    exact = ask(server, asked)
    assert exact.sources["blended"] == 0
    assert exact.cached_tokens <= 48
    assert exact.output_ids == whole.output_ids


def test_documents_that_only_the_pool_has_are_blended(server: Server) -> None:
    """As after a restart, or in another engine: neither L1 nor L2 nor the index knows of them."""
    seen = HEAD + prompt(71, 300) + prompt(72, 300)
    server.generate(seen)
    server.generate_from_pool(seen, 600)
    for attempt in range(20):  # what is in the pool is told of a moment later
        asked = prompt(80 + attempt, 5) + prompt(72, 300) + prompt(71, 300) + QUESTION
        server.flush()
        whole = ask(server, asked, polarkv_blend=True, polarkv_blend_ratio=1.0)
        if whole.sources["recomputed"] > 500:
            break
        time.sleep(0.1)
    assert whole.sources["recomputed"] > 580
    partly = ask(server, asked, polarkv_blend=True)
    assert partly.sources["blended"] > 480
    assert partly.sources["l3"] == 0
    # Nothing of it became a prefix, nor a donor of this engine.
    exact = ask(server, asked)
    assert (exact.cached_tokens, exact.sources["blended"]) == (0, 0)
    assert exact.output_ids == whole.output_ids


BLOCK_BYTES = 2 * 3 * 2 * 32 * 4 * 16  # K and V, layers, heads, dimensions of fp32, tokens


def corrupt_blocks_before_the_last(node: RunningNode) -> None:
    """Change a byte of some of the blocks that were put last, in the slab of a memory node's process."""
    with open(f"/proc/{node.pid}/maps", encoding="utf-8") as file:
        ranges = [line.split()[0].split("-") for line in file if " rw" in line]
    start, end = max(
        ((int(one, 16), int(other, 16)) for one, other in ranges), key=lambda each: each[1] - each[0]
    )
    with open(f"/proc/{node.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        used = np.flatnonzero(np.frombuffer(memory.read(end - start), np.uint8))
        for blocks in (10, 25):
            at = start + int(used[-1]) - blocks * BLOCK_BYTES
            memory.seek(at)
            byte = memory.read(1)[0]
            memory.seek(at)
            memory.write(bytes([byte ^ 0x40]))


@pytest.mark.slow
def test_engines_share_donors_through_the_pool_and_do_without(tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "llama", dtype=torch.float32)
    seen, other = HEAD + prompt(91, 300) + prompt(92, 300), prompt(93, 400) + prompt(94, 300)
    broken = HEAD + prompt(95, 300) + prompt(96, 300)
    with running_node("256MiB") as node:
        flags = (*FLAGS, "--polarkv-nodes", node.address)
        with running_server(model, tmp_path / "one.log", *flags, environment=ONE_THREAD) as one:
            for documents in (seen, other, broken):
                one.generate(documents)
                one.generate_from_pool(documents, 600)
            corrupt_blocks_before_the_last(node)
        with running_server(model, tmp_path / "two.log", *flags, environment=ONE_THREAD) as two:
            asked = prompt(92, 300) + prompt(91, 300) + QUESTION
            whole = ask(two, asked, polarkv_blend=True, polarkv_blend_ratio=1.0)
            assert whole.sources["recomputed"] > 580
            assert ask(two, asked, polarkv_blend=True).sources["blended"] > 480
            assert ask(two, asked).output_ids == whole.output_ids
            asked = prompt(96, 300) + prompt(95, 300) + QUESTION
            partly = ask(two, asked, polarkv_blend=True, polarkv_blend_ratio=1.0)
            assert 100 < partly.sources["recomputed"] < 550, "what follows a corrupt block is no donor"
            assert ask(two, asked).output_ids == partly.output_ids
            node.kill()
            asked = prompt(94, 300) + prompt(93, 400) + QUESTION
            without = ask(two, asked, polarkv_blend=True)
            assert (without.sources["blended"], without.sources["recomputed"]) == (0, 0)
            two.flush()
            assert ask(two, asked).output_ids == without.output_ids


def test_the_embedded_node_ends_with_the_last_engine_however_that_ends(
    server: Server, runtime_folder: Path
) -> None:
    """Last: the module's server does not survive it."""
    pid = json.loads((runtime_folder / "node.json").read_text())["pid"]
    assert not is_gone(pid)
    server.kill()
    eventually(lambda: is_gone(pid))
