"""The command line that the benchmark scripts share."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import msgspec

from examples.common.processes import free_ports, say, unwind_on_signals
from examples.multiturn.goals import verdicts
from examples.multiturn.presets import Preset, Scenario
from examples.multiturn.report import all_figures, draw, report, table, write
from examples.multiturn.runner import Results, Runner, describe_rate
from examples.multiturn.sessions import check
from examples.multiturn.systems import SYSTEMS, Setting, System, choose
from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import ConfigError, PolarError

_PORTS = 32


def main(scenario: Scenario, arguments: Sequence[str] | None = None) -> int:
    """Run a script; returns its exit status: 1 where a request failed or greedy outputs differ."""
    parser = _parser(scenario)
    args = parser.parse_args(arguments)
    try:
        preset = _adjusted(scenario.preset(args.preset), args)
        urls = parse_urls(args.base_url)
        systems = _chosen(args, urls)
        for node in args.nodes:
            parse_address(node)
        _check_picture(args.json)
    except ConfigError as error:
        parser.error(str(error))
    unwind_on_signals()
    started = time.monotonic()
    args.logs.mkdir(parents=True, exist_ok=True)
    for log in args.logs.glob("*.log"):
        log.unlink()
    storage = Path(tempfile.mkdtemp(prefix="files-", dir=args.logs))
    try:
        if args.model is None and preset.prepare is not None and not Path(preset.model).exists():
            preset.prepare(Path(preset.model))
        say(f"{scenario.title}; {preset.name} preset, {', '.join(system.label for system in systems)}")
        say(describe_sizes(preset))
        setting = Setting(
            preset=preset,
            model=preset.model,
            tp=preset.tp,
            logs=args.logs,
            storage=storage,
            ports=cycle(free_ports(_PORTS)),
            nodes=tuple(args.nodes),
            engine_flags=tuple(shlex.split(args.engine_flags)),
            mooncake_python=args.mooncake_python,
            mooncake_protocol=args.mooncake_protocol,
        )
        runner = Runner(scenario, preset, systems, setting, repeats=preset.repeats, seed=args.seed, urls=urls)
        results = runner.run()
    except PolarError as error:
        print(f"\n{scenario.name} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has ended.", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    status = _show(scenario, results, args.json)
    say(f"done in {time.monotonic() - started:.0f} s")
    return status


def describe_sizes(preset: Preset) -> str:
    """What is really played, and on which sizes; the title says what was published."""
    talk, sizes = preset.conversations, preset.tiers
    return (
        f"{talk.sessions} sessions of {talk.rounds} rounds after {talk.history_tokens} tokens of history: "
        f"{talk.working_set_tokens} tokens in the end; L1 {sizes.l1_tokens}, L2 {sizes.l2_tokens}, "
        f"L3 {sizes.l3_tokens}; pages of {preset.page_tokens}"
    )


def parse_urls(given: Sequence[str]) -> dict[str, str]:
    """``SYSTEM=URL`` each. Raises ConfigError."""
    urls: dict[str, str] = {}
    for item in given:
        name, separator, url = item.partition("=")
        if name not in SYSTEMS or not separator or not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url {item}: write SYSTEM=http://HOST:PORT with a system of {', '.join(SYSTEMS)}"
            )
        if name in urls:
            raise ConfigError(f"--base-url names {name} twice")
        urls[name] = url
    return urls


def _chosen(args: argparse.Namespace, urls: dict[str, str]) -> list[System]:
    """By --systems; else those of --base-url; else what can be run here."""
    names: str | None = args.systems
    if names is None and urls:
        return [system for system in SYSTEMS.values() if system.name in urls]
    systems = choose(names, args.mooncake_python, running=set(urls))
    missing = set(urls) - {system.name for system in systems}
    if missing:
        raise ConfigError(f"--base-url names {', '.join(sorted(missing))}, which --systems leaves out")
    return systems


def _adjusted(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset with what the command line replaces."""
    talk = preset.conversations
    for name in ("sessions", "rounds"):
        value = getattr(args, name)
        if value is not None:
            talk = msgspec.structs.replace(talk, **{name: _at_least_one(name, value)})
    preset = msgspec.structs.replace(
        preset,
        conversations=talk,
        repeats=_at_least_one("repeats", preset.repeats if args.repeats is None else args.repeats),
        limit_s=preset.limit_s if args.repeats is None else None,
        min_rounds=preset.min_rounds if _may_be_cut(args) else None,
        tp=_at_least_one("tp", preset.tp if args.tp is None else args.tp),
        model=preset.model if args.model is None else args.model,
    )
    check(talk)
    if args.qps is not None:
        if not args.qps > 0:
            raise ConfigError(f"--qps {args.qps} is not above 0")
        preset = msgspec.structs.replace(preset, qps=args.qps, load=0.0)
    return preset


def _may_be_cut(args: argparse.Namespace) -> bool:
    """Whether fewer rounds may be played than the preset has: nobody asked for a size or a rate of the run.

    Nor are there servers that run already, whose start would be reckoned wrongly.
    """
    return args.rounds is None and args.repeats is None and args.qps is None and not args.base_url


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"--{name} {value} is below 1")
    return value


def _check_picture(path: Path) -> None:
    """Before minutes are spent rather than after."""
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the picture needs matplotlib: pip install '.[examples]' ({error})") from error


def _show(scenario: Scenario, results: Results, path: Path) -> int:
    goals = [verdict.line() for verdict in verdicts(scenario, results)]
    rows = all_figures(scenario, results)
    whole = report(scenario, results, goals)
    written = [*write(rows, whole, path), path.with_suffix(".png")]
    draw(rows, whole, written[-1])
    print(f"\n{table(rows, whole)}\n\n{describe_rate(results.rate, results.preset)}")
    for name, restored in results.restores.items():
        print(
            f"{SYSTEMS[name].label}: restored from L3 {restored.restored_ttft_s:.3f} s, L1 hit"
            f" {restored.l1_ttft_s:.3f} s, ratio {restored.ratio:.2f}; {restored.prompts} prompts,"
            f" {restored.missed} more not restored"
        )
    print("\n".join([*goals, f"written: {', '.join(map(str, written))}"]), flush=True)
    for more in whole.systems:
        for difference in more.differences:
            print(f"greedy outputs differ: {more.system}, {difference}", file=sys.stderr)
        for error in more.errors:
            print(f"failed: {more.system}: {error}", file=sys.stderr)
    return 0 if all(row.outputs_equal and not row.failed for row in rows) else 1


def _parser(scenario: Scenario) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{scenario.name}",
        description=f"{scenario.title}. Published: {scenario.published_result}.",
    )
    option = parser.add_argument
    option("--preset", choices=("published", "laptop"), default="laptop", help="default: %(default)s")
    option("--systems", metavar="A,B", help=f"of {', '.join(SYSTEMS)}; default: all that can be run here")
    option("--json", type=Path, default=Path(f"{scenario.name}.json"), help="figures; default: %(default)s")
    option(
        "--repeats",
        type=int,
        help="of all turns on every system; default: the preset's, fewer where there is no time",
    )
    option("--base-url", action="append", default=[], metavar="SYSTEM=URL", help="a server that runs already")
    option("--model", help="path or name of the model")
    option("--tp", type=int, help="tensor parallel size")
    option(
        "--nodes",
        type=lambda text: text.split(","),
        default=[],
        metavar="H:P,H:P",
        help="memory nodes that run already",
    )
    option("--engine-flags", default="", metavar="FLAGS", help="more flags for every SGLang server, quoted")
    option("--sessions", type=int, help="conversations")
    option("--rounds", type=int, help="turns of each; default: the preset's, fewer where there is no time")
    option("--qps", type=float, help="requests a second that arrive; all rounds are played then")
    option("--seed", type=int, default=1, help="of arrivals and of random text")
    option("--mooncake-python", type=Path, help="Python interpreter that has Mooncake; default: this one")
    option("--mooncake-protocol", default="tcp", help="tcp or rdma; default: %(default)s")
    option("--logs", type=Path, default=Path(f"build/{scenario.name}"), help="folder for the servers' logs")
    return parser
