"""Direct mode with a real engine: what the pool loses, breaks or is late with is computed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.common import tiny_models
from tests.engine.servers import Server, prompt, running_server
from tests.faults.nodes import FaultyNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

DEADLINE_S = 0.5
CHUNK = 256  # tokens; what is longer is prefilled in chunks, beside requests that decode
LOST = "did not arrive; they are computed"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def node() -> Iterator[FaultyNode]:
    with FaultyNode("256MiB").start() as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, node: FaultyNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(model, log, *flags(node)) as running:
        yield running


@pytest.fixture(scope="module")
def mapped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, FaultyNode]]:
    """Over mapped memory, where layers are used as they come, before their blocks are checked."""
    log = tmp_path_factory.mktemp("mapped") / "server.log"
    with (
        FaultyNode("256MiB").start() as node,
        running_server(model, log, *flags(node, tls="all")) as server,
    ):
        yield server, node


def flags(node: FaultyNode, tls: str = "tcp") -> tuple[str, ...]:
    """Over tcp by default: a slab that is mapped outlives its node, and loads from it do not fail."""
    pool = ("--polarkv-nodes", node.address, "--polarkv-deadline", str(DEADLINE_S), "--polarkv-ucx-tls", tls)
    return ("--polarkv-mode", "direct", *pool, "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk")


def lost_loads(server: Server) -> int:
    """Loads that failed so far, by the engine's log."""
    return server.log.read_text(errors="replace").count(LOST)


def test_a_prefix_comes_from_the_pool_and_is_attributed_to_it(server: Server) -> None:
    asked = prompt(1, 800)
    first = server.generate(asked)
    again = server.generate_from_pool(asked, at_least=784)
    assert again.output_ids == first.output_ids
    assert again.tiers is not None
    assert again.tiers.l2 == 0
    server.flush()
    greedy = {"temperature": 0, "max_new_tokens": 1}
    details = server.post("/generate", input_ids=asked, sampling_params=greedy)["meta_info"]
    assert details["cached_tokens_details"] == {"device": 0, "host": 0, "storage": 784}  # type: ignore[index]
    longer = asked + prompt(2, 700)
    whole = server.generate(longer)
    assert server.generate_from_pool(longer, at_least=1488).output_ids == whole.output_ids


def test_broken_blocks_are_computed(server: Server, node: FaultyNode) -> None:
    asked = prompt(10, 800)
    first = server.generate(asked)
    server.generate_from_pool(asked, at_least=784)
    server.flush()
    before = lost_loads(server)
    node.spoil_blocks()
    reply = server.generate(asked)
    assert lost_loads(server) == before + 1
    assert reply.output_ids == first.output_ids
    assert reply.tiers is not None
    assert reply.tiers.computed == 800
    # What was computed again is in the pool again.
    assert server.generate_from_pool(asked, at_least=784).output_ids == first.output_ids


def test_a_prefill_whose_first_chunk_lost_its_prefix_starts_over(server: Server, node: FaultyNode) -> None:
    head = prompt(20, 800)
    asked = head + prompt(21, 900)
    server.generate(head)
    server.generate_from_pool(head, at_least=784)
    server.flush()
    before = lost_loads(server)
    node.spoil_blocks()
    reply = server.generate(asked)
    assert lost_loads(server) == before + 1
    assert reply.tiers is not None
    assert reply.tiers.computed == len(asked)
    server.flush()
    assert server.generate(asked).output_ids == reply.output_ids


@pytest.mark.parametrize("fault", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_node_that_fails_in_loads_under_traffic_costs_no_request_and_no_token(
    server: Server, node: FaultyNode, fault: str
) -> None:
    # More prompts than L1 holds, so that they are loaded all the time.
    prompts = [prompt(100 + number, 400 + 100 * number) for number in range(8)]
    expected = [server.generate(each).output_ids for each in prompts]
    before = lost_loads(server)
    turns, over = itertools.count(), threading.Event()

    def ask() -> list[bool]:
        equal = []
        while not over.is_set():
            number = next(turns) % len(prompts)
            equal.append(server.generate(prompts[number]).output_ids == expected[number])
        return equal

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        hangups = pool.submit(hang_up_until, over, server, prompts)
        try:
            end = time.monotonic() + 90
            while lost_loads(server) == before and time.monotonic() < end:
                sent = node.statistics().sent_blocks_total
                node.wait_for("sent_blocks_total", sent + 1)
                if fault == "killed":
                    node.kill()
                    node.start()
                else:
                    node.freeze()
                    time.sleep(2 * DEADLINE_S)  # longer than a load waits
                    node.thaw()
        finally:
            over.set()
        assert all(all(each.result()) for each in asking)
        assert hangups.result() > 0
    assert lost_loads(server) > before, "no load was hit"
    assert server.generate(prompts[0]).output_ids == expected[0]
    server.flush()
    assert server.generate(prompts[0]).output_ids == expected[0]


@pytest.mark.slow
def test_layers_that_are_not_numbers_do_not_end_an_engine_that_samples(
    mapped: tuple[Server, FaultyNode],
) -> None:
    server, node = mapped
    asked = prompt(1, 800)
    server.generate_from_pool(asked, at_least=784)
    server.flush()
    before = lost_loads(server)
    node.spoil_blocks()
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 4}
    reply = server.post("/generate", input_ids=asked, sampling_params=sampling)
    assert lost_loads(server) == before + 1
    assert len(reply["output_ids"]) == 4  # type: ignore[arg-type]


@pytest.mark.slow
def test_wrong_layers_that_a_pass_has_used_cost_no_token_of_any_request(
    mapped: tuple[Server, FaultyNode],
) -> None:
    server, node = mapped
    prompts = [prompt(100 + number, 400 + 100 * number) for number in range(8)]
    expected = [server.generate(each).output_ids for each in prompts]
    before, over = lost_loads(server), threading.Event()

    def ask(first: int) -> list[bool]:
        numbers = itertools.islice(itertools.cycle(range(8)), first, first + 25)
        return [server.generate(prompts[number]).output_ids == expected[number] for number in numbers]

    def spoil_until_over() -> None:
        while not over.wait(0.2):
            node.spoil_blocks()

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        spoiling = pool.submit(spoil_until_over)
        try:
            assert all(all(equal) for equal in pool.map(ask, range(4)))
        finally:
            over.set()
        spoiling.result()
    assert lost_loads(server) > before + 3


@pytest.mark.slow
def test_two_ranks_of_either_mode_read_what_the_other_wrote(model: Path, tmp_path: Path) -> None:
    asked, other = prompt(300, 800), prompt(301, 800)
    with FaultyNode().start() as node:
        direct_flags = (*flags(node), "--tp", "2")
        hicache_flags = ("--polarkv-nodes", node.address, "--tp", "2")
        with running_server(model, tmp_path / "direct.log", *direct_flags) as direct:
            first = direct.generate(asked)
            assert direct.generate_from_pool(asked, at_least=784).output_ids == first.output_ids
            before = lost_loads(direct)
            direct.flush()
            node.spoil_blocks()
            assert direct.generate(asked).output_ids == first.output_ids
            assert lost_loads(direct) > before
            direct.generate_from_pool(asked, at_least=784)
        with running_server(model, tmp_path / "hicache.log", *hicache_flags) as hicache:
            reply = hicache.generate(asked)
            assert reply.tiers is not None
            assert reply.tiers.l3 >= 784
            assert reply.output_ids == first.output_ids
            second = hicache.generate(other)
            hicache.generate_from_pool(other, at_least=784)
        with running_server(model, tmp_path / "again.log", *direct_flags) as direct:
            reply = direct.generate(other)
            assert reply.tiers is not None
            assert reply.tiers.l3 >= 784
            assert reply.output_ids == second.output_ids


def hang_up_until(over: threading.Event, server: Server, prompts: list[list[int]]) -> int:
    """Ask and leave before the answer, again and again; how often."""
    count, draw = 0, random.Random(1)
    while not over.is_set():
        asked = json.dumps({"input_ids": draw.choice(prompts), "sampling_params": {"max_new_tokens": 50}})
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5) as client:
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n{asked}".encode())
            time.sleep(draw.uniform(0, 0.1))
            count += 1
    return count
