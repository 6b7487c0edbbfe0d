"""The embedded node, shared by processes that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from polarkv_sglang.errors import PolarError
from polarkv_sglang.pool.embedded import default_capacity_bytes, start_or_join
from polarkv_sglang.transport.messages import Statistics

CAPACITY = 64 << 20
HOLDER = """
import sys
from pathlib import Path
from polarkv_sglang.pool.embedded import start_or_join
node = start_or_join(capacity_bytes=64 << 20, token=None, runtime_dir=Path(sys.argv[1]))
print(node.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A runtime folder; the node that is left in it at the end is killed."""
    folder = tmp_path / "run"
    yield folder
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(json.loads((folder / "node.json").read_text())["pid"], signal.SIGKILL)


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine, as far as the embedded node can tell; starts without waiting."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def pid_of(process: subprocess.Popen[str]) -> int:
    """The node that this holder has joined."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def eventually(condition: Callable[[], bool], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Ended; perhaps not reaped yet by the init process of a container."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_two_starters_share_one_node_which_ends_with_the_last(folder: Path):
    with holder(folder) as one, holder(folder) as two:
        pid = pid_of(one)
        assert pid_of(two) == pid
        one.communicate("")
        time.sleep(3.0)  # longer than the node lingers
        assert not is_gone(pid)
        two.communicate("")
        eventually(lambda: is_gone(pid))
    assert not (folder / "node.json").exists()


def test_killed_holder_does_not_keep_the_node(folder: Path):
    with holder(folder) as only:
        pid = pid_of(only)
        only.kill()
        eventually(lambda: is_gone(pid))


def test_node_outlives_the_process_that_started_it(folder: Path):
    with holder(folder) as starter:
        pid = pid_of(starter)
        children = [child.pid for child in psutil.Process(starter.pid).children(recursive=True)]
        assert pid not in children  # SGLang kills these when it ends
        node = start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)
        starter.kill()
        starter.wait()
        time.sleep(3.0)
        assert node.lifeline.request(Statistics(1), 5.0).capacity_bytes == CAPACITY
        node.close()


def test_record_of_a_killed_node_is_replaced(folder: Path):
    first = start_or_join(capacity_bytes=CAPACITY, token="one", runtime_dir=folder)
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: is_gone(first.pid))
    second = start_or_join(capacity_bytes=CAPACITY, token="two", runtime_dir=folder)
    assert second.pid != first.pid
    first.close()
    second.close()


def test_record_that_points_to_somebody_else_is_replaced(folder: Path):
    folder.mkdir(mode=0o700)
    record = {"pid": os.getpid(), "address": "127.0.0.1:1", "token": "x"}
    (folder / "node.json").write_text(json.dumps(record))
    node = start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)
    assert node.address != "127.0.0.1:1"
    node.close()


def test_damaged_record_is_replaced(folder: Path):
    folder.mkdir(mode=0o700)
    (folder / "node.json").write_text("{")
    start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder).close()


def test_other_token_than_the_running_node_is_an_error_that_names_it(folder: Path):
    with contextlib.closing(start_or_join(capacity_bytes=CAPACITY, token="one", runtime_dir=folder)) as node:
        with pytest.raises(PolarError, match="another token than POLARKV_TOKEN"):
            start_or_join(capacity_bytes=CAPACITY, token="two", runtime_dir=folder)
        same = start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)
        assert (same.pid, same.token) == (node.pid, "one")
        same.close()


def test_capacity_of_the_first_counts(folder: Path, caplog: pytest.LogCaptureFixture):
    first = start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)
    with caplog.at_level("INFO"):
        second = start_or_join(capacity_bytes=2 * CAPACITY, token=None, runtime_dir=folder)
    assert second.lifeline.welcome.capacity_bytes == CAPACITY
    assert "its capacity of 64.0 MiB counts, not 128.0 MiB" in caplog.text
    second.close()
    first.close()


def test_only_its_user_can_read_the_token(folder: Path):
    with contextlib.closing(start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)) as node:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "node.json").stat().st_mode) == 0o600
        assert len(node.token) == 32
        assert node.token not in " ".join(psutil.Process(node.pid).cmdline())


def test_folder_that_others_can_enter_is_refused(folder: Path):
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(PolarError, match="POLARKV_RUNTIME_DIR"):
        start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)


def test_symbolic_link_as_folder_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PolarError, match="POLARKV_RUNTIME_DIR"):
        start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder)


def test_node_that_cannot_start_says_why(folder: Path):
    with pytest.raises(PolarError, match=r"did not start: .*nowhere\.so"):
        start_or_join(capacity_bytes=CAPACITY, token=None, runtime_dir=folder, ucx_library="/nowhere.so")


def test_default_capacity_is_a_small_share_of_free_memory():
    capacity = default_capacity_bytes()
    assert 64 << 20 <= capacity <= max(64 << 20, psutil.virtual_memory().total // 8)
