"""PolarKV inside one scheduler process: what its parts share, made once and kept until the process ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polarkv_sglang.config import PolarConfig, load_config
from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport.tls import client_tls
from polarkv_sglang.weights import WeightsGuard, WeightsIdentity, identify_model

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class PolarRuntime:
    """Settings, pool client and weights identity of one rank.

    HiCache makes and drops storage objects as its backend is attached and detached; connections,
    registered memory and the identity of the weights live here instead.
    """

    def __init__(self, config: PolarConfig) -> None:
        self.config = config
        self.kv_dtype: str | None = None  # of the device pool, which the host pool does not tell
        self.gpu_memory = False  # whether blocks are to lie in a GPU's; set before the client's first use
        self.weights = WeightsGuard(self._identify)
        # Told the page hashes of blocks that were put, by the thread that puts them; must not wait.
        self.on_stored: Callable[[Sequence[str]], None] | None = None
        self._model_runner: ModelRunner | None = None
        self._client: PoolClient | None = None
        self._lock = threading.Lock()

    def bind_model(self, runner: ModelRunner) -> None:
        """Name the weights that the engine was started with, and follow their updates from now on.

        Called once, by ``polarkv_sglang.engine.attach``; a collective over all ranks. Raises ConfigError or
        IncompatibleSGLang if updates cannot be followed: KV then has no name, and nothing is shared.
        """
        from polarkv_sglang.weight_updates import follow_updates

        if self._model_runner is not None:
            # What is cached may be of weights that were there before.
            raise ConfigError("a model is bound to PolarKV's runtime already; attach one cache, once")
        follow_updates()
        self._model_runner = runner
        self.weights.name()
        self.weights.adopt()

    @property
    def is_bound(self) -> bool:
        """Whether KV has all of its name: the weights and the device pool's dtype are known."""
        return self._model_runner is not None and self.kv_dtype is not None

    @property
    def client(self) -> PoolClient:
        """The pool client; connecting starts at the first use and goes on in the background."""
        with self._lock:
            if self._client is None:
                config = self.config
                self._client = PoolClient(
                    config.nodes,
                    nodes_file=Path(config.nodes_file) if config.nodes_file is not None else None,
                    token=config.token,
                    tls=client_tls(config.tls_cert, config.tls_key, config.tls_ca),
                    deadline_s=config.deadline_s,
                    copies=config.copies,
                    client=f"{socket.gethostname()} pid {os.getpid()}",
                    ucx_library=config.ucx_library,
                    ucx_tls=config.ucx_tls,
                    gpu_memory=self.gpu_memory,
                )
            return self._client

    def _identify(self) -> WeightsIdentity:
        if self._model_runner is None:
            raise RuntimeError("the weights are named before a model was bound")
        return identify_model(self._model_runner)


_runtime: PolarRuntime | None = None


def start_runtime(config: PolarConfig) -> PolarRuntime:
    """Make this process's runtime; the plugin does so before SGLang builds the cache."""
    global _runtime
    _runtime = PolarRuntime(config)
    return _runtime


def started_runtime() -> PolarRuntime | None:
    """This process's runtime, if it has one by now."""
    return _runtime


def current_runtime() -> PolarRuntime:
    """This process's runtime; a fork that uses our classes without the plugin gets one from POLARKV_*."""
    return _runtime or start_runtime(load_config(environ=os.environ))
