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
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.common import tiny_models
from tests.engine.servers import STRICT_CHECKS, Server, prompt, running_server
from tests.faults.nodes import FaultyNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

DEADLINE_S = 0.5
CHUNK = 256  # tokens; what is longer is prefilled in chunks, beside requests that decode
LOST = "did not arrive; they are computed"
LOST_IN_USE = "which has used layers of it"
# So much KV that loads take a while and come in several groups of layers.
SIZES = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 128}
# Requests of four clients by which layers are used before they are checked, whatever was lost before.
SETTLED = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("model") / "llama", sizes=SIZES)


@pytest.fixture(scope="module")
def node() -> Iterator[FaultyNode]:
    with FaultyNode("1GiB").start() as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, node: FaultyNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(model, log, *flags(node), environment=STRICT_CHECKS) as running:
        yield running


@pytest.fixture(scope="module")
def mapped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, FaultyNode]]:
    """Over mapped memory, where layers are used as they come, before their blocks are checked."""
    log = tmp_path_factory.mktemp("mapped") / "server.log"
    with (
        FaultyNode("1GiB").start() as node,
        running_server(model, log, *flags(node, tls="all"), environment=STRICT_CHECKS) as server,
    ):
        yield server, node


def flags(node: FaultyNode, tls: str = "tcp") -> tuple[str, ...]:
    """Over tcp by default: a slab that is mapped outlives its node, and loads from it do not fail."""
    pool = ("--polarkv-nodes", node.address, "--polarkv-deadline", str(DEADLINE_S), "--polarkv-ucx-tls", tls)
    return ("--polarkv-mode", "direct", *pool, "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk")


def lost_loads(server: Server, how: str = LOST) -> int:
    """Loads that failed so far, by the engine's log."""
    return server.log.read_text(errors="replace").count(how)


def check_nothing_is_left(server: Server, node: FaultyNode) -> None:
    """No lease; L1 free to the last slot, which SGLang checks when it is idle, and ends if not."""
    node.wait_until(lambda now: now.leases == 0, "no lease is left")
    server.flush()
    time.sleep(1.0)
    assert server.process.poll() is None
    assert server.generate(prompt(900, 800)).tiers is not None


def test_beams_are_refused(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/generate", input_ids=prompt(1, 50), sampling_params={"beam_width": 2})
    assert refused.value.code == 400
    assert "--polarkv-mode direct" in refused.value.read().decode()


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
    before = lost_loads(server, LOST_IN_USE)
    turns, settled, over = itertools.count(), threading.Event(), threading.Event()

    def ask() -> list[bool]:
        equal = []
        while not over.is_set():
            turn = next(turns)
            number = turn % len(prompts)
            equal.append(server.generate(prompts[number]).output_ids == expected[number])
            if turn > SETTLED:
                settled.set()
        return equal

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        hangups = pool.submit(hang_up_until, over, server, prompts)
        try:
            assert settled.wait(90)
            end = time.monotonic() + 90
            while lost_loads(server, LOST_IN_USE) == before and time.monotonic() < end:
                # Once the first layers of a load have come, and some of the others not yet.
                sent = node.statistics().sent_bytes_total
                node.wait_for("sent_bytes_total", sent + 1)
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
    assert lost_loads(server, LOST_IN_USE) > before, "no load was hit"
    assert server.generate(prompts[0]).output_ids == expected[0]
    check_nothing_is_left(server, node)
    assert server.generate(prompts[0]).output_ids == expected[0]


def test_a_request_that_is_aborted_in_mid_load_leaves_nothing_behind(
    server: Server, node: FaultyNode
) -> None:
    """Both where the load then lands and where it is lost."""
    asked = prompt(500, 1500)
    first = server.generate(asked)
    server.generate_from_pool(asked, at_least=1488)
    seen: set[bool] = set()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for attempt in range(40):
            if len(seen) == 2:
                break
            loses = attempt % 2 == 1
            server.flush()
            before, sent = lost_loads(server), node.statistics().sent_bytes_total
            reply = pool.submit(ask_for_abort, server, asked, rid=f"aborted {attempt}")
            node.wait_for("sent_bytes_total", sent + 1)
            node.freeze()
            time.sleep(0.1)
            loading = not reply.done()
            server.post("/abort_request", rid=f"aborted {attempt}")
            time.sleep(2 * DEADLINE_S if loses else 0.0)
            node.thaw()
            aborted = reply.result()
            if loading and aborted and (lost_loads(server) > before) == loses:
                seen.add(loses)
            server.generate_from_pool(asked, at_least=1488)
    assert seen == {True, False}, "no request was aborted in mid-load"
    check_nothing_is_left(server, node)
    assert server.generate_from_pool(asked, at_least=1488).output_ids == first.output_ids


def ask_for_abort(server: Server, asked: list[int], rid: str) -> bool:
    """Whether a long request was aborted."""
    sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    try:
        reply = server.post("/generate", input_ids=asked, sampling_params=sampling, rid=rid)
    except urllib.error.HTTPError:
        return True
    return reply["meta_info"]["finish_reason"]["type"] == "abort"  # type: ignore[index]


@pytest.mark.slow
def test_random_traffic_ends_with_nothing_leaked(server: Server, node: FaultyNode) -> None:
    """Chunked prefill, mixed batches, hang-ups, aborts, broken blocks and a frozen node for a minute."""
    prompts = [prompt(600 + number, 300 + 150 * number) for number in range(10)]
    expected = [server.generate(each).output_ids for each in prompts]
    over = threading.Event()

    def ask(seed: int) -> list[bool]:
        draw, equal = random.Random(seed), []
        while not over.is_set():
            number = draw.randrange(len(prompts))
            if draw.random() < 0.3:
                rid = f"soak {seed} {len(equal)}"
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    pool.submit(ask_for_abort, server, prompts[number], rid)
                    time.sleep(draw.uniform(0, 0.3))
                    server.post("/abort_request", rid=rid)
            else:
                equal.append(server.generate(prompts[number]).output_ids == expected[number])
        return equal

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, seed) for seed in range(5)]
        hangups = pool.submit(hang_up_until, over, server, prompts)
        try:
            end, draw = time.monotonic() + 60, random.Random(7)
            while time.monotonic() < end:
                time.sleep(draw.uniform(0.2, 2.0))
                if draw.random() < 0.5:
                    node.spoil_blocks()
                else:
                    node.freeze()
                    time.sleep(draw.uniform(0.05, 2 * DEADLINE_S))
                    node.thaw()
        finally:
            over.set()
        replies = [each.result() for each in asking]
        assert all(all(equal) for equal in replies)
        assert hangups.result() > 0
    check_nothing_is_left(server, node)


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
def test_embeddings_are_computed_with_layers_that_have_come(model: Path, tmp_path: Path) -> None:
    """Also those whose blocks are broken, which are computed again."""
    prompts = [prompt(700 + number, 400 + 200 * number) for number in range(4)]
    with (
        FaultyNode("1GiB").start() as node,
        running_server(
            model, tmp_path / "server.log", *flags(node), "--is-embedding", environment=STRICT_CHECKS
        ) as server,
    ):

        def embed(asked: list[int]) -> list[float]:
            return server.post("/encode", input_ids=asked)["embedding"]  # type: ignore[return-value]

        def embed_all() -> list[list[float]]:
            with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(embed, prompts))

        expected = [pytest.approx(embed(asked), abs=1e-4) for asked in prompts]
        whole = sum((len(asked) - 1) // 16 for asked in prompts)
        node.wait_until(lambda now: now.blocks >= whole, "all blocks are in the pool")
        for broken in (False, True):
            server.flush()
            if broken:
                node.spoil_blocks()
            sent = node.statistics().sent_bytes_total
            assert embed_all() == expected
            assert node.statistics().sent_bytes_total > sent, "nothing came from the pool"
            assert (lost_loads(server) > 0) == broken
        assert server.log.read_text(errors="replace").count("did not wait for its loads") == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "deepseek_v2"])
def test_two_ranks_of_either_mode_read_what_the_other_wrote(
    model: Path, architecture: str, tmp_path: Path
) -> None:
    """With K and V split over the ranks, and with latent KV, which both hold and one writes."""
    asked, other = prompt(300, 800), prompt(301, 800)
    if architecture != "llama":
        model = tiny_models.build(architecture, tmp_path / "model")
    with FaultyNode("1GiB").start() as node:
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
            check_many_at_once(direct, node)  # and spoil all blocks again
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


def check_many_at_once(server: Server, node: FaultyNode) -> None:
    """Batches of several loads, which land or are lost."""
    prompts = [prompt(310 + number, 300 + 100 * number) for number in range(6)]
    expected = [server.generate(each).output_ids for each in prompts]
    before = lost_loads(server)
    for broken in (False, True):
        server.generate_from_pool(prompts[-1], at_least=784)
        server.flush()
        if broken:
            node.spoil_blocks()
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            assert [each.output_ids for each in pool.map(server.generate, prompts)] == expected
        assert (lost_loads(server) > before) == broken


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
