"""Real SGLang servers with PolarKV, for tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.common.client import Reply, generate

READY_S = 240.0
MODELS = {"llama", "qwen3", "glm4_moe", "deepseek_v2"}  # SGLang's files of those that tests serve
# The two ways that SGLang offers to start a server.
LAUNCH_SERVER = (sys.executable, "-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
# SGLang ends if a slot of L1 is neither free nor in the tree nor a request's, while it is busy too.
STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}


@dataclass(frozen=True)
class Server:
    """An SGLang server in a process group of its own."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def generate(self, prompt: list[int], *, max_new_tokens: int = 12) -> Reply:
        """Greedy continuation; the sources of the prompt's tokens always add up."""
        reply = generate(self.port, prompt, max_new_tokens)
        assert reply.tiers is not None, "no meta_info['polarkv']"
        tiers = reply.tiers
        assert tiers.adds_up()
        assert tiers.prompt == len(prompt)
        # SGLang counts what it took from caches by itself.
        assert tiers.l1 + tiers.l2 + tiers.l3 == reply.cached_tokens
        assert tiers.computed > 0
        return reply

    def post(self, path: str, **body: object) -> dict[str, object]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read()
        try:
            return dict(json.loads(text))
        except (json.JSONDecodeError, TypeError, ValueError):
            return {}

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())

    def flush(self) -> None:
        """Lose L1 and L2; refused while a request is still winding down."""
        for _ in range(50):
            with contextlib.suppress(urllib.error.HTTPError):
                self.post("/flush_cache")
                return
            time.sleep(0.1)
        raise AssertionError("the cache could not be flushed")

    def generate_from_pool(self, prompt: list[int], at_least: int, **more: int) -> Reply:
        """Generate with L1 and L2 lost, once the write to the pool has ended."""
        for _ in range(40):
            self.flush()
            reply = self.generate(prompt, **more)
            if reply.tiers is not None and reply.tiers.l3 >= at_least:
                return reply
            time.sleep(0.25)
        raise AssertionError(f"only {reply.tiers} came from the pool\n{tail(self.log)}")

    def wait_until_ready(self) -> None:
        """Until it has answered its first request."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended\n{tail(self.log)}"
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise AssertionError(f"the server was not ready in {READY_S} s\n{tail(self.log)}")

    def kill(self) -> None:
        """SIGKILL for all its processes, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def starting_server(
    model: Path,
    log: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    launcher: tuple[str, ...] = LAUNCH_SERVER,
) -> Iterator[Server]:
    """Start a server with ``--enable-polarkv`` and go on at once: several may start side by side."""
    port = _free_port()
    line = [*launcher, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    line += ["--enable-polarkv", "--page-size", "16", "--max-total-tokens", "4096"]
    if "direct" not in flags:
        line += ["--hicache-ratio", "2"]
    # Single precision: random weights have near ties, which half precision decides by a batch's shape.
    line += ["--dtype", "float32", "--enable-metrics", *flags]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            line, env=engine_environment(environment), stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        server = Server(port, process, log)
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def running_server(
    model: Path,
    log: Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    launcher: tuple[str, ...] = LAUNCH_SERVER,
) -> Iterator[Server]:
    """Start a server with ``--enable-polarkv`` and wait until it has answered its first request."""
    with starting_server(model, log, *flags, environment=environment, launcher=launcher) as server:
        server.wait_until_ready()
        yield server


def engine_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process that is an engine: ours, and ``added``."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    models = {file.stem for file in Path(spec.origin).with_name("srt").glob("models/*.py")}
    assert models > MODELS
    # SGLang imports the files of all models, 250 of them, in each process.
    environment = os.environ | {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(models - MODELS)} | dict(added or {})
    environment.pop("UCX_MEM_EVENTS", None)  # of `make test`
    return environment


def _free_port() -> int:
    """At random: the server binds it only half a minute from now, and others look for ports too."""
    while True:
        port = random.randrange(20000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def prompt(seed: int, tokens: int, vocabulary: int = 512) -> list[int]:
    """A prompt of its own for each seed."""
    draw = random.Random(seed)
    return [draw.randrange(10, vocabulary) for _ in range(tokens)]
