"""A run's figures as JSON, as a table and as a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from examples.multiturn.figures import Details, Figures, Spread, details, figures
from examples.multiturn.presets import Scenario
from examples.multiturn.probe import Restore
from examples.multiturn.runner import Results
from examples.multiturn.systems import SYSTEMS


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run was made."""

    processor: str
    cores: int
    accelerators: int
    accelerator: str
    system: str
    load_average: tuple[float, float, float]  # when the run ended: what else the machine did shows in it
    versions: Mapping[str, str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run but its figures, which are a file of their own."""

    scenario: str
    preset: str
    model: str
    published_result: str
    environment: Environment
    qps: float
    published_qps: float | None
    request_s: float | None  # of one request with a fresh history, where the rate was derived from it
    page_tokens: int
    l1_tokens: int
    l2_tokens: int
    l3_tokens: int
    rounds: int  # as played
    working_set_tokens: int
    systems: tuple[Details, ...]
    restores: Mapping[str, Restore]
    goals: tuple[str, ...]


def environment() -> Environment:
    """Of this process, now."""
    import torch

    accelerated = torch.accelerator.is_available()
    count = torch.accelerator.device_count() if accelerated else 0
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return Environment(
        processor=_processor(),
        cores=os.cpu_count() or 0,
        accelerators=count,
        accelerator=name,
        system=f"{platform.system()} {platform.release()}",
        load_average=os.getloadavg(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in ("sglang", "torch", "polarkv-sglang")},
        },
    )


def all_figures(scenario: Scenario, results: Results) -> list[Figures]:
    """One a system; outputs are compared with those of the first."""
    baseline = next(iter(results.plays.values()))
    return [
        figures(scenario.name, results.preset.name, name, plays, baseline)
        for name, plays in results.plays.items()
    ]


def report(scenario: Scenario, results: Results, goals: Sequence[str]) -> Report:
    """What the figures leave out."""
    baseline = next(iter(results.plays))
    preset = results.preset
    sizes = preset.tiers
    return Report(
        scenario=scenario.name,
        preset=preset.name,
        model=preset.model,
        published_result=scenario.published_result,
        environment=environment(),
        qps=results.rate.qps,
        published_qps=preset.published_qps,
        request_s=results.rate.request_s,
        page_tokens=preset.page_tokens,
        l1_tokens=sizes.l1_tokens,
        l2_tokens=sizes.l2_tokens,
        l3_tokens=sizes.l3_tokens,
        rounds=preset.conversations.rounds,
        working_set_tokens=preset.conversations.working_set_tokens,
        systems=tuple(details(name, baseline, results.plays) for name in results.plays),
        restores=results.restores,
        goals=tuple(goals),
    )


def write(rows: Sequence[Figures], whole: Report, path: Path) -> tuple[Path, Path]:
    """Figures into ``path``, an array; all else beside it, as NAME.details.json. Returns both."""
    details_path = path.with_suffix(".details.json")
    for target, content in ((path, rows), (details_path, whole)):
        target.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    return path, details_path


def table(rows: Sequence[Figures], whole: Report) -> str:
    """Markdown, a line per system; times in seconds, ratios to the first system."""
    header = [
        "system", "TTFT p50", "p90", "p99", "mean", "lower by", "token gap", "tokens/s", "higher by",
        "L1 hits", "L2 hits", "L3 hits", "equal", "failed",
    ]  # fmt: skip
    baseline = rows[0].system
    lines = [header, ["-" * len(name) for name in header]]
    for row, more in zip(rows, whole.systems, strict=True):
        hits = row.hit_tokens
        lines.append(
            [
                SYSTEMS[row.system].label, f"{row.ttft_p50_s:.3f}", f"{more.ttft_p90_s:.3f}",
                f"{row.ttft_p99_s:.3f}", f"{row.ttft_mean_s:.3f}", ratio(more.ttft_ratio.get(baseline)),
                f"{more.token_gap_mean_s:.4f}", f"{row.output_tokens_per_s:.1f}",
                ratio(more.throughput_ratio.get(baseline)),
                *(f"{part / more.prompt_tokens:.0%}" for part in (hits.l1, hits.l2, hits.l3)),
                "yes" if row.outputs_equal else "NO", f"{row.failed}/{row.requests}",
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def ratio(measured: Spread | None) -> str:
    """With its range over the repeats, if there were several."""
    if measured is None:
        return "1"
    if measured.repeats == 1:
        return f"{measured.median:.2f}x"
    return f"{measured.median:.2f}x ({measured.low:.2f}-{measured.high:.2f})"


def draw(rows: Sequence[Figures], whole: Report, path: Path) -> None:
    """TTFT and tokens a second of every system as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [SYSTEMS[row.system].label for row in rows]
    places = range(len(rows))
    bars = {
        "p50": [row.ttft_p50_s for row in rows],
        "mean": [row.ttft_mean_s for row in rows],
        "p99": [row.ttft_p99_s for row in rows],
    }
    height = 0.8 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        shown = left.barh([place + (number - 1) * height for place in places], values, height, label=label)
        left.bar_label(shown, fmt="%.2f", padding=2, fontsize=7)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("time to first token, s")
    left.margins(x=0.12)
    left.legend(ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    shown = right.barh(places, [row.output_tokens_per_s for row in rows], 0.6, color="tab:green")
    right.bar_label(shown, fmt="%.1f", padding=2, fontsize=7)
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set_xlabel("output tokens/s")
    right.margins(x=0.12)
    where = whole.environment
    machine = where.accelerator or f"{where.cores} cores, no accelerator"
    repeats = next((measured.repeats for each in whole.systems for measured in each.ttft_ratio.values()), 1)
    figure.suptitle(
        f"{whole.scenario}, {whole.preset} preset, {machine}, {whole.qps:.2f} requests/s, repeats: {repeats}"
    )
    figure.savefig(path, dpi=120)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
