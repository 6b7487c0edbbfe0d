from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import ExitStack

import polarkv_sglang
from polarkv_sglang.cli.status import merge_views
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.messages import Commit, Locate, Peek, Reserve
from tests.cli.commands import absent_address, polarkv
from tests.support import running_node, running_nodes


def status(*arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    return polarkv("status", *arguments, env={"POLARKV_TOKEN": token} if token is not None else {})


def test_table_shows_what_the_node_holds():
    with running_node("64MiB", token="secret") as node, node.connect() as client:
        reserved = client.request(Reserve(client.next_id(), bytes(range(16)), NO_PARENT, 4096), 5.0)
        client.request(Commit(client.next_id(), reserved.reservation, b"\1", bytes(8)), 5.0)
        client.request(Locate(client.next_id(), bytes(range(16)) + bytes(48), 30.0), 5.0)
        done = status(node.address, token="secret")
    assert done.returncode == 0
    headings, row = done.stdout.splitlines()
    names = ["node", "out at", "state", "capacity", "used", "blocks", "hit rate", "leases", "evictions"]
    assert re.split(r"  +", headings) == [*names, "corrupt", "version"]
    version = polarkv_sglang.__version__
    assert row.split() == [
        *[node.address, "-", "up", "64.0", "MiB", "4.0", "KiB", "1", "25.0%", "1", "0", "0", version]
    ]


def test_one_node_that_is_down_is_told_apart_from_one_that_refuses_us():
    absent = absent_address()
    with running_node() as up, running_node(token="secret") as guarded:
        done = status(f"{up.address},{guarded.address}", absent)
    assert done.returncode == 1
    _, first, second, third = done.stdout.splitlines()
    assert first.startswith(up.address)
    assert " up " in first
    assert second.split(maxsplit=2)[2] == "refused: it asks for a token and we have none; set POLARKV_TOKEN"
    assert third.split(maxsplit=2)[2] == "unreachable: Connection refused; is it running there?"


def test_frozen_node_is_unreachable_within_the_deadline():
    with running_node() as node:
        node.freeze()
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
    assert down == {
        "node": absent,
        "state": "unreachable: Connection refused; is it running there?",
        "out_at": {},
        "clients": 0,
    }


def test_malformed_address_is_one_line():
    done = status("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "polarkv: pool node 'nowhere' is not host:port; write for example 10.0.0.4:7411\n"


def test_what_one_client_told_to_several_nodes_counts_once():
    first, second = "pid 7 at 10.0.0.9:40001", "pid 7 at 10.0.0.9:40002"
    silent = {"node-b:7411": "did not answer in time"}
    merged = merge_views([{first: silent, "pid 8 at 10.0.0.9:1": {}}, {second: {"node-c:7411": "is gone"}}])
    assert merged == {"pid 7 at 10.0.0.9": silent | {"node-c:7411": "is gone"}, "pid 8 at 10.0.0.9": {}}


def test_where_a_node_is_out_is_counted_and_each_reason_told_once():
    from polarkv_sglang.transport.messages import View

    down, unknown = absent_address(), "10.0.0.77:7411"
    with ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(2))
        for name, out in {
            "a": {down: f"memory node {down} is gone", nodes[1].address: "no lane"},
            "b": {down: f"memory node {down} is gone", unknown: "did not answer in time"},
            "c": {},
        }.items():
            for node in nodes:
                client = stack.enter_context(
                    ControlConnection.connect(
                        node.address, token=None, role="rank", client=name, deadline_s=5.0
                    )
                )
                client.send(View(out))
                client.request(Peek(client.next_id(), bytes(16)), 5.0)  # answered after the view was read
        addresses = [*(node.address for node in nodes), down]
        table, told = status(*addresses), status("--json", *addresses)
    rows, reasons = (part.splitlines() for part in table.stdout.split("\n\n"))
    assert [row.split()[1] for row in rows[1:]] == ["0/3", "1/3", "2/3"]
    assert rows[3].split(maxsplit=2)[2].startswith("unreachable: Connection refused")
    assert reasons == [
        f"{nodes[1].address} is out at a at 127.0.0.1: no lane",
        f"{down} is out at a at 127.0.0.1, b at 127.0.0.1: is gone",
        f"{unknown} is out at b at 127.0.0.1: did not answer in time",
    ]
    assert [(row["clients"], len(row["out_at"])) for row in json.loads(told.stdout)] == [
        (3, 0),
        (3, 1),
        (3, 2),
    ]
