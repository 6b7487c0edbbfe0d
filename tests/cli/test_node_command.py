from __future__ import annotations

import socket
from pathlib import Path

import psutil

import polarkv_sglang
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.tls import client_context
from tests.certificates import Authority
from tests.cli.commands import polarkv, polarkv_each
from tests.support import running_node

TLS_OF_NOBODY = ["--tls-cert", "/dev/null", "--tls-key", "/dev/null", "--tls-ca", "/nowhere/ca.pem"]


def test_version_is_that_of_the_package():
    done = polarkv("--version")
    assert (done.returncode, done.stdout) == (0, f"polarkv {polarkv_sglang.__version__}\n")


WRONG_SETTINGS = [
    (["--capacity", "much"], "size 'much' is not understood"),
    (["--capacity", "1MiB"], "capacity 1.0 MiB is below one segment of 2.0 MiB"),
    (["--capacity", "64MiB", "--segment", "5000"], "segment 5000 B is not a positive multiple of 4096"),
    (["--capacity", "64MiB", "--listen", "here"], "--listen 'here' is not HOST:PORT"),
    (["--capacity", "64MiB", "--token", ""], "--token is empty"),
    (["--capacity", "64MiB", "--ucx-tls", "cma"], "add tcp"),
    (["--capacity", "64MiB", "--ucx-library", "/nowhere/libucp.so.0"], "/nowhere/libucp.so.0"),
    (["--capacity", "64MiB", "--tls-cert", "cert.pem"], "no tls-key and no tls-ca; give all three"),
    (["--capacity", "64MiB", *TLS_OF_NOBODY], "/nowhere/ca.pem cannot be read: No such file"),
    (["--capacity", "64MiB", "--listen", "192.0.2.1:7411"], "cannot listen on 192.0.2.1:7411"),
]


def test_wrong_setting_is_one_line_that_names_it():
    each = polarkv_each([("node", *flags) for flags, _ in WRONG_SETTINGS])
    for done, (flags, complaint) in zip(each, WRONG_SETTINGS, strict=True):
        assert (done.returncode, done.stdout) == (2, ""), flags
        assert done.stderr.startswith("polarkv: ")
        assert complaint in done.stderr
        assert done.stderr.count("\n") == 1


def test_what_is_left_out_is_taken_from_the_environment():
    for name, value, complaint in (
        ("POLARKV_UCX_LIBRARY", "/nowhere/libucp.so.0", "/nowhere/libucp.so.0"),
        ("POLARKV_UCX_TLS", "cma", "add tcp"),
        ("POLARKV_TLS_CERT", "cert.pem", "no tls-key and no tls-ca; give all three"),
    ):
        done = polarkv("node", "--capacity", "64MiB", "--listen", "127.0.0.1:0", env={name: value})
        assert done.returncode == 2
        assert complaint in done.stderr


def test_taken_ports_are_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = polarkv("node", "--capacity", "64MiB", "--listen", f"127.0.0.1:{port}")
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
        flags = ["--listen", "127.0.0.1:0", "--metrics-port", port]
        done = polarkv("node", "--capacity", "64MiB", *flags)
        assert done.returncode == 2
        assert f"cannot serve metrics on 127.0.0.1:{port}" in done.stderr


def test_ready_line_tells_where_and_how_much_and_which_ucx():
    with running_node("96MiB", "--metrics-port", "0") as node:
        assert node.address.startswith("127.0.0.1:")
        assert ", capacity 96.0 MiB, libucp 1." in node.ready_line
        assert ", pages: " in node.ready_line
        assert node.metrics_url is not None
        assert node.stop() == 0


def test_node_may_have_as_many_descriptors_as_the_system_allows():
    with running_node(launcher=["prlimit", "--nofile=256:4096", "--"]) as node:
        assert psutil.Process(node.pid).rlimit(psutil.RLIMIT_NOFILE) == (4096, 4096)


def test_ipv6_address_can_be_listened_on():
    with running_node(listen="[::1]:0") as node, node.connect("observer"):
        assert node.address.startswith("[::1]:")


def test_token_flag_beats_the_variable():
    with running_node("64MiB", "--token", "flag", token="variable") as node:
        ControlConnection.connect(
            node.address, token="flag", role="rank", client="test", deadline_s=5.0
        ).close()


def test_tls_can_be_set_by_variables_and_flags_beat_them(tmp_path: Path):
    authority = Authority(tmp_path / "authority")
    good = authority.issue("node")
    variables = {f"POLARKV_TLS_{name.upper()}": path for name, path in good._asdict().items()}
    tls = client_context(*authority.issue("client"))
    with running_node(environment=variables) as node:
        assert node.ready_line.endswith(", TLS")
        ControlConnection.connect(
            node.address, token=None, role="rank", client="test", deadline_s=5.0, tls=tls
        ).close()
    broken = variables | {"POLARKV_TLS_CERT": "/nowhere/cert.pem"}
    with running_node("64MiB", "--tls-cert", good.cert, environment=broken) as node:
        assert node.ready_line.endswith(", TLS")
