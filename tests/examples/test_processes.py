from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from examples.common.processes import Process, ProcessFailed, free_ports

PARENT_WITH_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(child.pid))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("end", [Process.stop, Process.kill], ids=["stop", "kill"])
def test_the_child_ends_with_its_children(tmp_path, end):
    marker = tmp_path / "grandchild"
    process = Process(
        "parent", [sys.executable, "-c", PARENT_WITH_CHILD, str(marker)], marker.exists, tmp_path / "log"
    )
    process.start()
    process.wait_until_ready()
    grandchild = int(marker.read_text())
    assert is_running(grandchild)
    end(process)
    if end is Process.kill:
        assert not is_running(grandchild), "it has returned before all was gone"
    deadline = time.monotonic() + 10
    while is_running(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(grandchild)
    process.stop()  # a second time is nothing


def test_a_child_that_ends_early_is_reported_with_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    process = Process("engine", command, lambda: False, tmp_path / "log")
    process.start()
    with pytest.raises(ProcessFailed, match=r"(?s)engine ended with status 1.*no such model"):
        process.wait_until_ready()
    process.stop()


def test_the_command_line_shown_is_the_one_that_runs(tmp_path):
    program = [sys.executable, "-c", "import os; print('hello  ' + os.environ['WHOM'])"]
    process = Process("printer", program, lambda: False, tmp_path / "log", {"WHOM": "whole world"})
    process.start()
    with pytest.raises(ProcessFailed):
        process.wait_until_ready()
    process.stop()
    again = os.popen(process.command_line()).read()
    assert again == (tmp_path / "log").read_text() == "hello  whole world\n"


def test_free_ports_can_be_bound():
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as server:
            # As servers do: a port that a connection has just left is free for them.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
