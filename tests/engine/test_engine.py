"""What users of SGLang meet: servers that share a pool, lose it, change weights, and count tokens."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.common import tiny_models
from tests.engine.script import ANSWER
from tests.engine.servers import SGLANG_SERVE, Server, engine_environment, prompt, running_server, tail
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


@dataclass(frozen=True)
class Script:
    """tests/engine/script.py in a process group of its own; it takes a while until its first answer."""

    process: subprocess.Popen[str]
    log: Path

    def generate(self, prompt: list[int]) -> tuple[tuple[int, ...], dict[str, int]]:
        """Greedy continuation, and the sources of the prompt's tokens."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                answer = json.loads(line.removeprefix(ANSWER))
                return tuple(answer["output_ids"]), answer["sources"]
        raise AssertionError(f"the script ended\n{tail(self.log)}")

    def end(self) -> int:
        """Let it end its engine; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)


@pytest.fixture(scope="module")
def script(model: Path, node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """It goes on starting while the server, which its test names after it, starts too."""
    log = tmp_path_factory.mktemp("script") / "script.log"
    command = [sys.executable, "-m", "tests.engine.script", str(model), node.address]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            env=engine_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Script(process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(model: Path, node: RunningNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--polarkv-nodes", node.address, "--polarkv-deadline", str(DEADLINE_S))
    with running_server(model, log, *flags, launcher=SGLANG_SERVE) as running:
        yield running


def wait_for_blocks(node: RunningNode, count: int) -> None:
    end = time.monotonic() + 30
    while (held := node.statistics().blocks) < count:
        assert time.monotonic() < end, f"the node has {held} blocks instead of {count}"
        time.sleep(0.05)


def test_what_one_engine_computed_another_fetches(script: Script, server: Server, node: RunningNode) -> None:
    """One is a server, the other is used by a script."""
    asked = prompt(10, 800)
    first = server.generate(asked)
    wait_for_blocks(node, 800 // PAGE_TOKENS)
    output_ids, sources = script.generate(asked)
    assert sources["l3"] >= 784
    assert output_ids == first.output_ids
    # And the reverse.
    held = node.statistics().blocks
    output_ids, sources = script.generate(prompt(11, 800))
    assert sources["computed"] == 800
    wait_for_blocks(node, held + 800 // PAGE_TOKENS)
    reply = server.generate(prompt(11, 800))
    assert reply.tiers is not None
    assert reply.tiers.l3 >= 784
    assert reply.output_ids == output_ids
    assert script.end() == 0


def test_metrics_count_every_prompt_token_by_source(server: Server) -> None:
    def counted() -> dict[str, float]:
        lines = [
            line for line in server.get("/metrics").splitlines() if line.startswith("polarkv_prompt_tokens")
        ]
        return {line.split('source="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = counted()
    asked = prompt(20, 640)
    server.generate(asked)
    computed = counted()
    assert computed["computed"] - before.get("computed", 0) == len(asked)
    assert sum(computed.values()) - sum(before.values()) == len(asked)
    server.generate_from_pool(asked, at_least=624)
    assert counted()["l3"] - computed.get("l3", 0) >= 624
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
    assert max(took for _, took in answers) < 8 * alone_s + 3 * DEADLINE_S + 4
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
