"""A real SGLang server for tests, and what a client sees of its cache."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

START_S = 180.0
REQUEST_S = 60.0


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached: dict[str, int]  # tokens found, by SGLang's name of the tier; empty: none


class Engine:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def generate(self, prompt: str, new_tokens: int = 16) -> Answer:
        """Greedy, always `new_tokens` long."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        answer = json.loads(self._post("/generate", {"text": prompt, "sampling_params": sampling}))
        meta = answer["meta_info"]
        return Answer(
            tuple(answer["output_ids"]), meta["prompt_tokens"], meta.get("cached_tokens_details") or {}
        )

    def flush(self) -> None:
        """Forget L1 and L2."""
        self._post("/flush_cache", {})

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _post(self, path: str, body: Mapping[str, object]) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
            content: bytes = response.read()
        return content


@contextlib.contextmanager
def running_engine(
    model: Path, log: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Engine]:
    """``python -m sglang.launch_server``, ready; ended with all its processes. Its output goes to ``log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        engine = Engine(port)
        deadline = time.monotonic() + START_S
        while not engine.is_healthy():
            running = process.poll() is None and time.monotonic() < deadline
            assert running, log.read_text()[-5000:]
            time.sleep(0.3)
        yield engine
    finally:
        # The server's children are in its session, and do not all end with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
