"""The doctor: every check tells what it found, and every one that fails how to mend it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import polarkv_sglang
from polarkv_sglang.compat import BUILT_FOR
from polarkv_sglang.doctor import engine, host, pool, tls, ucx
from polarkv_sglang.doctor.findings import Check, Facts, Finding, examine
from tests.cli.commands import absent_address, environment, polarkv, ucx_without_tools
from tests.support import RunningNode, running_node

TLS_VARIABLES = ("POLARKV_TLS_CERT", "POLARKV_TLS_KEY", "POLARKV_TLS_CA")
EVERYWHERE = {
    "python", "packages", "configuration", "sglang", "plugin", "batch helper", "node helper", "libucp",
    "transports", "rdma", "locked memory", "memory", "huge pages", "open files", "same host", "tls",
}  # fmt: skip


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with running_node("64MiB", token="secret") as running:
        yield running


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings of PolarKV, to which a test adds its own."""
    for name in set(os.environ).difference(environment()):
        monkeypatch.delenv(name)
    return monkeypatch


def facts(*nodes: str, token: str | None = None, speed: bool = False) -> Facts:
    return Facts(nodes, token, speed=speed)


def by_check(output: str) -> dict[str, dict[str, object]]:
    return {finding["check"]: finding for finding in json.loads(output)}


def test_healthy_host_and_pool_pass_with_figures(node: RunningNode) -> None:
    env = {"POLARKV_NODES": node.address, "POLARKV_TOKEN": "secret"}
    done = polarkv("doctor", "--json", env=env)
    found = by_check(done.stdout)
    failed = {name: finding["text"] for name, finding in found.items() if finding["state"] == "failed"}
    assert (done.returncode, failed) == (0, {})
    assert done.stderr == ""
    reached = f"node {node.address}"
    assert {*EVERYWHERE, "loopback shm", "loopback tcp", reached} <= set(found)
    assert Path(details(found["libucp"])["path"]).is_file()
    assert "tcp" in details(found["transports"])["transports"]
    for name in ("loopback shm", "loopback tcp", reached):
        assert all(details(found[name])[figure] > 0 for figure in ("put", "get", "memcpy"))
    assert details(found[reached])["version"] == polarkv_sglang.__version__
    assert details(found[reached])["round_trip_ms"] > 0
    assert "secret" not in done.stdout


def details(finding: Mapping[str, object]) -> dict[str, object]:
    found = finding["details"]
    assert isinstance(found, dict)
    return found


def test_without_speed_nothing_is_written_to_the_pool(node: RunningNode) -> None:
    before = node.statistics().commits_total
    [finding] = pool.check_nodes(facts(node.address, token="secret"))
    assert finding.state == "ok"
    assert "put" not in finding.details
    assert node.statistics().commits_total == before
    [measured] = pool.check_nodes(facts(node.address, token="secret", speed=True))
    assert measured.details["put"] > 0
    assert node.statistics().commits_total > before


def test_nodes_of_a_file_are_checked_and_a_wrong_file_is_a_finding(
    node: RunningNode, settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check, file = Check("nodes", "pool:check_nodes", "unused"), tmp_path / "nodes"
    settings.setenv("POLARKV_NODES_FILE", str(file))
    file.write_text(f"{node.address} # the only one\n")
    [finding] = examine(check, facts(token="secret"))
    assert (finding.check, finding.state) == (f"node {node.address}", "ok")
    file.write_text(f"{node.address}\nnowhere\n")
    [finding] = examine(check, facts(token="secret"))
    assert (finding.check, finding.state) == ("nodes", "failed")
    assert f"nodes file {file}, line 2" in finding.text


def test_whatever_fails_is_a_line_with_its_mend_and_no_traceback() -> None:
    down = absent_address()
    env = {
        "POLARKV_UCX_LIBRARY": "/nowhere/libucp.so.0",
        "POLARKV_NODES": down,
        "SGLANG_PLUGINS": "another",
    }
    done = polarkv("doctor", env=env)
    assert done.returncode == 1
    assert (done.stderr, "Traceback" in done.stdout) == ("", False)
    lines = done.stdout.splitlines()
    failed = [number for number, line in enumerate(lines[:-1]) if line.startswith("failed")]
    assert all(lines[number + 1].strip().startswith("mend: ") for number in failed)
    told = "\n".join(lines[number] for number in failed)
    for words in ("libucp", "/nowhere/libucp.so.0", "plugin", f"node {down}", "Connection refused"):
        assert words in told
    assert lines[-1].startswith(f"{len(failed)} failed (")


def test_wrong_setting_is_named_with_those_that_are_known(settings: pytest.MonkeyPatch) -> None:
    settings.setenv("POLARKV_NODE", "10.0.0.4:7411")
    [finding] = engine.check_configuration(facts())
    assert finding.state == "failed"
    assert "POLARKV_NODE " in finding.text
    assert "POLARKV_NODES" in finding.mend


def test_configuration_shows_what_was_chosen_but_no_secret(
    settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "polarkv.toml").write_text('spill = "evict"\n')
    settings.setenv("POLARKV_CONFIG", str(tmp_path / "polarkv.toml"))
    settings.setenv("POLARKV_TOKEN", "hidden")
    [finding] = engine.check_configuration(facts())
    assert finding.state == "ok"
    assert "spill evict" in finding.text
    assert "token (set)" in finding.text
    assert "hidden" not in str(finding)


def test_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_HUGE_PAGES", None)
    [finding] = examine(Check("huge pages", "host:check_huge_pages", "unused"), facts())
    assert (finding.state, finding.text.startswith("the check itself failed: TypeError: ")) == (
        "failed",
        True,
    )
    assert "--log-level debug" in finding.mend


def test_package_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "cffi.py").write_text('raise ImportError("built for another Python")\n')
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = polarkv("doctor", env={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    [number] = [number for number, line in enumerate(lines) if line.split()[:2] == ["failed", "packages"]]
    assert "cffi: built for another Python" in lines[number]
    assert lines[number + 1].endswith("pip install --force-reinstall cffi")
    assert "not checked" in lines[-3]
    status = polarkv("status", absent_address(), env={"PYTHONPATH": path})
    assert status.stderr == "polarkv: built for another Python; polarkv doctor says what is missing\n"


def test_wrong_token_and_frozen_node_are_told_apart(node: RunningNode) -> None:
    with running_node() as frozen:
        frozen.freeze()
        started = time.monotonic()
        refused, silent = pool.check_nodes(facts(node.address, frozen.address, token="wrong"))
        assert time.monotonic() - started < 15.0
        os.kill(frozen.pid, signal.SIGCONT)
    assert (refused.state, silent.state) == ("failed", "failed")
    assert "token" in refused.text
    assert "POLARKV_TOKEN" in refused.mend
    assert "did not answer in time" in silent.text
    assert "frozen" in silent.mend


def test_sglang_is_judged_without_importing_it() -> None:
    code = (
        "import sys\n"
        "from polarkv_sglang.doctor.engine import check_sglang\n"
        "from polarkv_sglang.doctor.findings import Facts\n"
        "[finding] = check_sglang(Facts([], None, speed=False))\n"
        "print(finding.state, {'sglang', 'torch'} & set(sys.modules), 'imported' in finding.text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "ok set() False\n"  # nor by another process


def test_sglang_without_a_surface_is_named_with_the_version_to_install(
    settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "9.9.9"\n')
    (package / "srt" / "__init__.py").touch()
    (package / "srt" / "server_args.py").write_text("class ServerArgs:\n    pass\n")
    settings.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = polarkv("doctor", "--json", env={"POLARKV_UCX_LIBRARY": "/nowhere/libucp.so.0"})
    finding = by_check(done.stdout)["sglang"]
    assert finding["state"] == "failed"
    assert "SGLang 9.9.9 has no sglang.srt.server_args.ServerArgs.add_cli_args" in str(finding["text"])
    assert f"pip install sglang=={BUILT_FOR}" in str(finding["mend"])


def test_libucp_says_what_was_taken_and_what_was_passed_over(
    settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # In a process of its own: one process can hold one UCX.
    done = polarkv("doctor", "--json", "--no-speed", env={"POLARKV_UCX_LIBRARY": ucx_without_tools(tmp_path)})
    found = by_check(done.stdout)
    libucp = details(found["libucp"])
    assert (libucp["source"], libucp["path"]) == ("explicit", str(tmp_path / "libucp.so.0"))
    assert "explicit goes first" in str(libucp["passed_over"])
    # Without ucx_info what UCX offers cannot be told, which is no reason to fail.
    assert (found["transports"]["state"], done.returncode) == ("warning", 0)
    assert "ucx-utils" in str(found["transports"]["mend"])


def test_rdma_device_that_ucx_cannot_use_is_a_warning_with_the_mend(
    settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = tmp_path / "class" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "link_layer").write_text("InfiniBand\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    (port / "state").write_text("1: DOWN\n")
    settings.setattr(ucx, "_DEVICES", tmp_path / "class")
    settings.setattr(ucx, "_DEVICE_FILES", tmp_path / "dev")
    [down] = ucx.check_rdma(facts())
    assert (down.state, "no port is active" in down.text) == ("warning", True)
    (port / "state").write_text("4: ACTIVE\n")
    [closed] = ucx.check_rdma(facts())
    assert (closed.state, "cannot be opened" in closed.text) == ("warning", True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "uverbs0").touch()
    [unusable] = ucx.check_rdma(facts())
    assert unusable.state == "warning"
    assert "mlx5_0 (ACTIVE InfiniBand 200 Gb/sec (4X HDR))" in unusable.text
    assert "POLARKV_UCX_LIBRARY" in unusable.mend


def test_same_host_says_whether_memory_can_be_mapped() -> None:
    [finding] = host.check_same_host(facts())
    assert finding.details["mapped"] is True
    assert finding.state == "ok"


class Authority:
    """Signs certificates; all files in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca = str(folder / "ca.pem")
        self._key = str(folder / "ca.key")
        openssl("req", "-x509", *NEW_KEY, "-keyout", self._key, "-out", self.ca, "-subj", "/CN=authority")

    def issue(self, name: str, days: int = 365) -> tuple[str, str]:
        """Certificate and key for 10.0.0.4; ``days`` below 0: expired."""
        cert, key, request, names = (
            str(self._folder / f"{name}.{kind}") for kind in ("pem", "key", "csr", "ext")
        )
        Path(names).write_text("subjectAltName=IP:10.0.0.4\n")
        openssl("req", *NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signed_by = ["-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", str(days)]
        openssl("x509", "-req", "-in", request, *signed_by, "-out", cert, "-extfile", names)
        os.chmod(key, 0o600)
        return cert, key


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


def test_tls_files_are_judged_by_a_handshake(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    cert, key = authority.issue("node")
    short, short_key = authority.issue("short", days=2)
    expired, expired_key = authority.issue("expired", days=-1)

    def judge(*files: str) -> Finding:
        for name, file in zip(TLS_VARIABLES, files):
            settings.setenv(name, file)
        [finding] = tls.check_tls(facts())
        return finding

    good = judge(cert, key, authority.ca)
    assert (good.state, "10.0.0.4" in good.text) == ("ok", True)
    assert judge(short, short_key, authority.ca).state == "warning"
    os.chmod(key, 0o644)
    assert judge(cert, key, authority.ca).mend == f"chmod 600 {key}"
    for files, words in {
        (expired, expired_key, authority.ca): "certificate has expired",
        (cert, key, other.ca): "unable to get local issuer certificate",
        (cert, short_key, authority.ca): "key values mismatch",
        (cert, key, cert + ".gone"): "No such file or directory",
    }.items():
        bad = judge(*files)
        assert (bad.state, bool(bad.mend)) == ("failed", True)
        assert words in bad.text
    settings.delenv("POLARKV_TLS_KEY")
    [incomplete] = tls.check_tls(facts())
    assert (incomplete.state, incomplete.text) == ("failed", "POLARKV_TLS_KEY is not set")
