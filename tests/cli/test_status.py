from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import polarkv_sglang
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport.messages import Commit, Locate, Reserve
from tests.support import running_node


def status(*arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "POLARKV_TOKEN"}
    if token is not None:
        environ["POLARKV_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "polarkv_sglang.cli", "status", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
    )


def absent_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_table_shows_what_the_node_holds():
    with running_node("64MiB", token="secret") as node, node.connect() as client:
        reserved = client.request(Reserve(client.next_id(), bytes(range(16)), NO_PARENT, 4096), 5.0)
        client.request(Commit(client.next_id(), reserved.reservation, b"\1", bytes(8)), 5.0)
        client.request(Locate(client.next_id(), bytes(range(16)) + bytes(48), 30.0), 5.0)
        done = status(node.address, token="secret")
    assert done.returncode == 0
    headings, row = done.stdout.splitlines()
    names = "node state capacity used blocks hit_rate leases evictions corrupt version"
    assert headings.replace("hit rate", "hit_rate").split() == names.split()
    version = polarkv_sglang.__version__
    assert row.split() == [
        *[node.address, "up", "64.0", "MiB", "4.0", "KiB", "1", "25.0%", "1", "0", "0", version]
    ]


def test_one_node_that_is_down_is_told_apart_from_one_that_refuses_us():
    absent = absent_address()
    with running_node() as up, running_node(token="secret") as guarded:
        done = status(f"{up.address},{guarded.address}", absent)
    assert done.returncode == 1
    _, first, second, third = done.stdout.splitlines()
    assert first.startswith(up.address)
    assert " up " in first
    assert second.split(maxsplit=1)[1] == "refused: it asks for a token and we have none; set POLARKV_TOKEN"
    assert third.split(maxsplit=1)[1] == "unreachable: Connection refused; is it running there?"


def test_frozen_node_is_unreachable_within_the_deadline():
    with running_node() as node:
        os.kill(node.pid, signal.SIGSTOP)
        started = time.monotonic()
        done = status(node.address)
        assert time.monotonic() - started < 15.0
        assert done.returncode == 1
        assert "unreachable: did not answer in time" in done.stdout
        os.kill(node.pid, signal.SIGCONT)


def test_json_holds_everything_and_the_state_of_each():
    absent = absent_address()
    with running_node() as node:
        done = status("--json", node.address, absent)
    up, down = json.loads(done.stdout)
    assert (up["node"], up["state"], up["capacity_bytes"]) == (node.address, "up", 64 << 20)
    assert len(bytes.fromhex(up["node_id"])) == 16
    assert up["refused_total"] == {}
    assert down == {"node": absent, "state": "unreachable: Connection refused; is it running there?"}


def test_malformed_address_is_one_line():
    done = status("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "polarkv: pool node 'nowhere' is not host:port; write for example 10.0.0.4:7411\n"
