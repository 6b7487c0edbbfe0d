"""``polarkv doctor``: what works on this host and in the pool, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polarkv_sglang.doctor.findings import Check, Finding

LOG_LEVEL = "critical"  # what fails is a finding

_NAME_WIDTH = 14
_INDENT = " " * 9


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "doctor",
        help="check this host and the pool, and say how to mend what is wrong",
        description="Checks this host, its settings and the memory nodes, and says how to mend what is "
        "wrong. Settings are those of POLARKV_* and POLARKV_CONFIG, as engines read them. Exit code 0 if "
        "nothing failed.",
    )
    parser.add_argument(
        "--nodes",
        metavar="A:P,B:P",
        help="Memory nodes to check. Default: those configured, if any.",
    )
    parser.add_argument("--json", action="store_true", help="Print all findings with their details, as JSON.")
    parser.add_argument(
        "--no-speed",
        action="store_true",
        help="Measure nothing, and write nothing to the memory nodes of the pool.",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if nothing failed, else 1."""
    from polarkv_sglang.doctor.findings import Facts, examine, unchecked

    nodes = [address.strip() for address in (args.nodes or "").split(",") if address.strip()]
    facts = Facts(
        nodes,
        args.token,
        speed=not args.no_speed,
        tls_files=(args.tls_cert, args.tls_key, args.tls_ca),
    )
    findings: list[Finding] = []
    for finding in chain.from_iterable([*(examine(check, facts) for check in _checks()), unchecked(facts)]):
        findings.append(finding)
        if not args.json:
            print(_as_lines(finding), flush=True)
    if args.json:
        print(json.dumps([_as_object(finding) for finding in findings], indent=2))
    else:
        print(_summary(findings))
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def _checks() -> list[Check]:
    from polarkv_sglang.doctor.findings import Check

    return [
        Check("python", "interpreter:check_python", "use Python 3.11 to 3.13 on Linux"),
        Check("packages", "interpreter:check_packages", "install the package again, with what it needs"),
        Check("configuration", "engine:check_configuration", "correct that setting"),
        Check("sglang", "engine:check_sglang", "install the SGLang that PolarKV was built for"),
        Check("plugin", "engine:check_plugin", "install the package into this Python"),
        Check("batch helper", "ucx:check_helper", "install the package again, with a C compiler at hand"),
        Check("libucp", "ucx:check_libucp", "install UCX 1.17 or later, such as the libucx-cu13 wheel"),
        Check("transports", "ucx:check_transports", "mend libucp, or leave tcp in the list of transports"),
        Check("rdma", "ucx:check_rdma", "see what rdma link and ibv_devinfo say"),
        Check("locked memory", "ucx:check_locked_memory", "ulimit -l unlimited"),
        Check("memory", "host:check_memory", "see that /proc and /sys/fs/cgroup can be read"),
        Check("huge pages", "host:check_huge_pages", "see that /proc/meminfo can be read"),
        Check("open files", "host:check_open_files", "ulimit -n 65536"),
        Check("same host", "host:check_same_host", "see that /proc of other processes can be read"),
        Check("tls", "tls:check_tls", "give a certificate, its key and the authority's certificate"),
        Check("loopback", "pool:check_loopback", "see the checks of UCX and of this host above"),
        Check("nodes", "pool:check_nodes", "see polarkv status"),
    ]


def _as_lines(finding: Finding) -> str:
    line = f"{finding.state:<7}  {finding.check:<{_NAME_WIDTH}}  {finding.text}"
    return f"{line}\n{_INDENT}mend: {finding.mend}" if finding.mend else line


def _as_object(finding: Finding) -> dict[str, object]:
    return {
        "check": finding.check,
        "state": finding.state,
        "text": finding.text,
        "mend": finding.mend or None,
        "details": dict(finding.details),
    }


def _summary(findings: list[Finding]) -> str:
    parts = []
    for state in ("failed", "warning", "ok"):
        names = [finding.check for finding in findings if finding.state == state]
        if names:
            parts.append(f"{len(names)} {state}" + ("" if state == "ok" else f" ({', '.join(names)})"))
    return "; ".join(parts)
