"""What users of SGLang meet: servers that share a pool, lose it, change weights, and count tokens."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from examples.common import tiny_models
from tests.engine.servers import Server, prompt, running_server
from tests.support import RunningNode, running_node

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

DEADLINE_S = 0.5
PAGE_TOKENS = 16  # of servers.py


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with running_node("256MiB") as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--polarkv-nodes", node.address, "--polarkv-deadline", str(DEADLINE_S))
    with running_server(model, log, *flags) as running:
        yield running


def wait_for_blocks(node: RunningNode, count: int) -> None:
    end = time.monotonic() + 30
    while (held := node.statistics().blocks) < count:
        assert time.monotonic() < end, f"the node has {held} blocks instead of {count}"
        time.sleep(0.05)


def test_what_one_server_computed_another_fetches(
    server: Server, model: Path, node: RunningNode, tmp_path: Path
) -> None:
    asked = prompt(10, 800)
    first = server.generate(asked)
    wait_for_blocks(node, 800 // PAGE_TOKENS)
    # The other is started the other way that SGLang offers.
    serve = (str(Path(sys.executable).with_name("sglang")), "serve")
    with running_server(
        model, tmp_path / "other.log", "--polarkv-nodes", node.address, launcher=serve
    ) as other:
        second = other.generate(asked)
        assert second.tiers is not None
        assert second.tiers.l3 >= 784
        assert second.output_ids == first.output_ids
        # And the reverse.
        held = node.statistics().blocks
        back = other.generate(prompt(11, 800))
        wait_for_blocks(node, held + 800 // PAGE_TOKENS)
        reply = server.generate(prompt(11, 800))
        assert reply.tiers is not None
        assert reply.tiers.l3 >= 784
        assert reply.output_ids == back.output_ids


def test_metrics_count_every_prompt_token_by_source(server: Server) -> None:
    def counted() -> dict[str, float]:
        lines = [
            line for line in server.get("/metrics").splitlines() if line.startswith("polarkv_prompt_tokens")
        ]
        return {line.split('source="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = counted()
    asked = prompt(20, 640)
    server.generate(asked)
    server.generate_from_pool(asked, at_least=624)
    after = counted()
    assert after["l3"] - before.get("l3", 0) >= 624
    assert (sum(after.values()) - sum(before.values())) % len(asked) == 0
    assert "polarkv_live_nodes 1.0" in server.get("/metrics")


def test_after_a_weight_update_nothing_old_is_served(
    server: Server, model: Path, node: RunningNode, tmp_path: Path
) -> None:
    asked = prompt(30, 640)
    old = server.generate(asked)
    server.generate_from_pool(asked, at_least=624)
    other = tiny_models.build("llama", tmp_path / "other", seed=1)
    # The update comes with a write to the pool in flight.
    server.generate(prompt(31, 640))
    assert server.post("/update_weights_from_disk", model_path=str(other))["success"]
    new = server.generate(asked)
    assert new.tiers is not None
    assert (new.tiers.l1, new.tiers.l2, new.tiers.l3) == (0, 0, 0)
    assert new.output_ids != old.output_ids
    assert server.generate_from_pool(asked, at_least=624).output_ids == new.output_ids
    # Back to the first weights: their KV is theirs again.
    assert server.post("/update_weights_from_disk", model_path=str(model))["success"]
    again = server.generate(asked)
    assert again.tiers is not None
    assert again.tiers.l3 >= 624
    assert again.output_ids == old.output_ids
    # An update that fails changes nothing: what is computed next is shared, without a flush.
    with pytest.raises(urllib.error.HTTPError):
        server.post("/update_weights_from_disk", model_path=str(tmp_path / "absent"))
    before = node.statistics().commits_total
    server.generate(prompt(32, 640))
    end = time.monotonic() + 15
    while node.statistics().commits_total < before + 40:
        assert time.monotonic() < end, "KV is no longer shared after a failed update"
        time.sleep(0.2)


def test_tenants_do_not_share(server: Server) -> None:
    asked = prompt(40, 640)
    sampling = {"temperature": 0, "max_new_tokens": 4}

    def ask(**identity: str) -> dict[str, int]:
        reply = server.post("/generate", input_ids=asked, sampling_params=sampling, **identity)
        return dict(reply["meta_info"]["polarkv"])  # type: ignore[index]

    assert ask(extra_key="tenant A")["computed"] == len(asked)
    time.sleep(0.5)
    server.flush()
    assert ask(extra_key="tenant B")["computed"] == len(asked)
    assert ask()["computed"] == len(asked)
    server.flush()
    assert ask(extra_key="tenant A")["l3"] >= 624


def test_an_engine_without_an_address_shares_an_embedded_node_that_ends_with_it(
    model: Path, tmp_path: Path
) -> None:
    """As a script that uses sglang.Engine does it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, sys
import sglang
from polarkv_sglang.plugin import server_args
if __name__ == "__main__":
    arguments = server_args(polarkv={{"capacity": 1 << 27}}, model_path={str(model)!r}, page_size=16,
                            max_total_tokens=4096, hicache_ratio=2.0, log_level="error")
    engine = sglang.Engine(server_args=arguments)
    asked = {prompt(50, 640)!r}
    greedy = {{"temperature": 0, "max_new_tokens": 8}}
    first = engine.generate(input_ids=asked, sampling_params=greedy)
    import time
    time.sleep(1)
    engine.flush_cache()
    second = engine.generate(input_ids=asked, sampling_params=greedy)
    record = json.load(open(sys.argv[1] + "/node.json"))
    print("RESULT", json.dumps([first["output_ids"] == second["output_ids"],
                                second["meta_info"]["polarkv"], record["pid"]]))
    engine.shutdown()
"""
    )
    environ = {**os.environ, "POLARKV_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-3000:]
    equal, sources, node_pid = json.loads(results[0].removeprefix("RESULT"))
    assert equal
    assert sources["l3"] >= 624
    end = time.monotonic() + 15
    while psutil.pid_exists(node_pid) and psutil.Process(node_pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the embedded node outlived its last engine"
        time.sleep(0.1)


def test_two_ranks_spill_what_leaves_l1_and_share_nothing_old_after_an_update(
    model: Path, node: RunningNode, tmp_path: Path
) -> None:
    flags = ("--tp", "2", "--polarkv-spill", "evict", "--max-total-tokens", "2048", "--hicache-ratio", "1.5")
    with running_server(model, tmp_path / "ranks.log", "--polarkv-nodes", node.address, *flags) as ranks:
        prompts = [prompt(200 + number, 600) for number in range(8)]
        first = [ranks.generate(each) for each in prompts]
        again = [ranks.generate(each) for each in prompts]
        assert [reply.output_ids for reply in again] == [reply.output_ids for reply in first]
        assert sum(reply.tiers.l3 for reply in again if reply.tiers is not None) >= 2 * 592
        other = tiny_models.build("llama", tmp_path / "other", seed=1)
        assert ranks.post("/update_weights_from_disk", model_path=str(other))["success"]
        new = [ranks.generate(each) for each in prompts[:3]]
        assert all(reply.tiers is not None and reply.tiers.computed == 600 for reply in new)
        assert ranks.post("/update_weights_from_disk", model_path=str(model))["success"]
        back = ranks.generate(prompts[0])
        assert back.tiers is not None
        assert back.tiers.l3 >= 592
        assert back.output_ids == first[0].output_ids


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL], ids=["frozen", "killed"])
def test_a_pool_that_fails_under_traffic_costs_no_request_and_no_token(
    server: Server, node: RunningNode, fault: signal.Signals
) -> None:
    """Last: the module's node does not survive it."""
    wait_for_pool(server)
    prompts = [prompt(100 + number, 600) for number in range(6)]
    expected = [server.generate(each).output_ids for each in prompts]
    failed_at = threading.Event()

    def ask(number: int) -> tuple[bool, float]:
        if number == 4:
            os.kill(node.pid, fault)
            failed_at.set()
        if number % 3 == 0:
            time.sleep(0.05)
        started = time.monotonic()
        reply = server.generate(prompts[number % len(prompts)])
        return reply.output_ids == expected[number % len(prompts)], time.monotonic() - started

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(24)))
    assert all(equal for equal, _ in answers)
    assert failed_at.is_set()
    # The pool is out now: a flushed prompt is computed, and waits for nobody.
    server.flush()
    started = time.monotonic()
    assert server.generate(prompts[0]).output_ids == expected[0]
    alone_s = time.monotonic() - started
    # Four at a time share two cores with each other; beyond that, two lookups and a read may each time out.
    assert max(took for _, took in answers) < 8 * alone_s + 3 * DEADLINE_S + 2
    if fault is signal.SIGSTOP:
        os.kill(node.pid, signal.SIGCONT)
        wait_for_pool(server)
        server.generate(prompts[0])
        assert server.generate_from_pool(prompts[0], at_least=592).output_ids == expected[0]


def wait_for_pool(server: Server) -> None:
    """Until the engine has its memory node in use; its metrics move with the requests."""
    end = time.monotonic() + 30
    while "polarkv_live_nodes 1.0" not in server.get("/metrics"):
        assert time.monotonic() < end
        server.generate(prompt(99, 20), max_new_tokens=1)
        time.sleep(0.2)
