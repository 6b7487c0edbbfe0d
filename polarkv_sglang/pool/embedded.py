"""The memory node that engines without a pool address share: one per user and host.

Found through a file in the runtime folder: $POLARKV_RUNTIME_DIR, else $XDG_RUNTIME_DIR/polarkv, else
/tmp/polarkv-<uid>. It is started by the first engine and ends with the last, however that ends: each
engine holds a *lifeline*, a connection whose end the node notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import NodeError, PolarError
from polarkv_sglang.transport.control import ControlConnection, NodeRefused, NodeTimeout

START_DEADLINE_S = 30.0
JOIN_DEADLINE_S = 5.0
_RECORD = "node.json"
_LOCK = "lock"
_LOG = "node.log"

_logger = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the running node; readable by its user alone."""

    pid: int
    address: str
    token: str


@dataclass(frozen=True)
class EmbeddedNode:
    """A share in the embedded node; it lives at least as long as this is open."""

    address: str  # 127.0.0.1:port
    token: str
    pid: int
    lifeline: ControlConnection

    def close(self) -> None:
        """Give up the share."""
        self.lifeline.close()


def start_or_join(
    *,
    capacity_bytes: int,
    token: str | None,
    runtime_dir: Path | None = None,
    ucx_tls: str | None = None,
    ucx_library: str | None = None,
) -> EmbeddedNode:
    """Join this user's embedded node on this host, or start it.

    The one who starts it decides its capacity, transports and token (None: a random one). Raises PolarError
    if the running one has another token, speaks another version or does not answer, and if none can be
    started; at the latest after about START_DEADLINE_S seconds.
    """
    folder = _private_folder(runtime_dir)
    with _locked(folder):
        node = _join(folder, token)
        if node is None:
            flags = ["--capacity", str(capacity_bytes)]
            flags += ["--ucx-tls", ucx_tls] if ucx_tls is not None else []
            flags += ["--ucx-library", ucx_library] if ucx_library is not None else []
            _start(folder, flags, token or secrets.token_hex(16))
            node = _join(folder, token)
            if node is None:
                raise PolarError(f"the embedded memory node ended at once; see {folder / _LOG}")
            return node
    if node.lifeline.welcome.capacity_bytes != capacity_bytes:
        _logger.info(
            "joined the embedded memory node at %s; its capacity of %s counts, not %s",
            node.address,
            format_bytes(node.lifeline.welcome.capacity_bytes),
            format_bytes(capacity_bytes),
        )
    return node


def default_capacity_bytes() -> int:
    """An eighth of the memory that this process may have; 64 MiB at least, 64 GiB at most."""
    available = int(psutil.virtual_memory().available)
    return max(64 << 20, min(64 << 30, min([available, *memory_limits()]) // 8))


def memory_limits() -> Iterator[int]:
    """Limits of our control group and those above it, in bytes (cgroup v2, else v1)."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (limit := folder / name).is_file():
                text = limit.read_text(encoding="ascii").strip()
                if text != "max":
                    yield int(text)


@contextlib.contextmanager
def published(folder: Path, address: str, token: str | None) -> Iterator[None]:
    """For the node itself: be found in ``folder`` until the block is left. Its starter holds the lock."""
    record = folder / _RECORD
    fresh = folder / f"{_RECORD}.{os.getpid()}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(_Record(pid=os.getpid(), address=address, token=token or "")))
    fresh.replace(record)
    try:
        yield
    finally:
        # Under the lock, or we could remove the record of a successor. If somebody has it, he is about to
        # find that we do not answer, and replaces the record.
        try:
            with _locked(folder, wait=False):
                found = _read(folder)
                if found is not None and found.pid == os.getpid():
                    record.unlink()
        except BlockingIOError:
            _logger.info("left %s to whoever is starting a node now", record)


def _private_folder(given: Path | None) -> Path:
    """The runtime folder, which nobody else can read or replace."""
    if given is None and (variable := os.environ.get("POLARKV_RUNTIME_DIR")):
        given = Path(variable)
    if given is None and (variable := os.environ.get("XDG_RUNTIME_DIR")) and os.access(variable, os.W_OK):
        given = Path(variable, "polarkv")
    folder = given or Path("/tmp", f"polarkv-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise PolarError(
            f"runtime folder {folder} cannot be made ({error.strerror}); set POLARKV_RUNTIME_DIR"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PolarError(
            f"runtime folder {folder} is not a folder of ours alone (mode 0700); set POLARKV_RUNTIME_DIR"
        )
    return folder


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock; without ``wait``, BlockingIOError if another process has it."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + 2 * START_DEADLINE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise
                if time.monotonic() > deadline:
                    raise PolarError(f"another process keeps {folder / _LOCK} locked; end it") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _read(folder: Path) -> _Record | None:
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=_Record)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        _logger.warning("%s is damaged and will be replaced", folder / _RECORD)
        return None


def _join(folder: Path, token: str | None) -> EmbeddedNode | None:
    """A share in the node that is recorded; None if there is no record or the node is gone."""
    record = _read(folder)
    if record is None or not psutil.pid_exists(record.pid):
        return None
    try:
        lifeline = ControlConnection.connect(
            record.address,
            token=record.token,
            role="lifeline",
            client=f"engine {os.getpid()}",
            deadline_s=JOIN_DEADLINE_S,
        )
    except (NodeRefused, NodeTimeout):
        raise  # it is there: a second one beside it would take the memory twice
    except NodeError as error:
        _logger.info("the recorded embedded memory node is gone: %s", error)
        return None
    if token is not None and token != record.token:
        lifeline.close()
        raise PolarError(
            f"the embedded memory node at {record.address} (pid {record.pid}) was started with another "
            "token than POLARKV_TOKEN; use that one, none, or another POLARKV_RUNTIME_DIR"
        )
    return EmbeddedNode(record.address, record.token, record.pid, lifeline)


def _start(folder: Path, flags: list[str], token: str) -> None:
    """Start a node that outlives us, and wait until it has published itself; PolarError if it does not."""
    command = [sys.executable, "-m", "polarkv_sglang.cli", "node", "--listen", "127.0.0.1:0"]
    command += ["--embedded", str(folder), *flags]
    log = folder / _LOG
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stderr:
        # The token goes by the environment: everybody may read a command line.
        launcher = subprocess.Popen(
            command,
            env=os.environ | {"POLARKV_TOKEN": token},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert launcher.stdout is not None
    with launcher, launcher.stdout as ready:  # the launcher ends once the node has detached from it
        if select.select([ready], [], [], START_DEADLINE_S)[0] and ready.readline():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise PolarError(f"the embedded memory node did not start: {''.join(tail) or f'no answer; see {log}'}")
