"""``polarkv blend-check``: does a model blend rightly, and what does it cost in accuracy."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from polarkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    from polarkv_sglang.blend.check import Compared

LOG_LEVEL = "error"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "blend-check",
        help="check that CacheBlend works with a model, and measure what it does to its answers",
        description="Compares blended prefills with full ones, on prompts of real text whose documents were "
        "seen in another order, and writes the verdict that engines want before they blend with the model. "
        "Exit code 0 if it passed.",
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or name of the model, as SGLang takes it.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a ratio.")
    parser.add_argument("--tokens", type=int, default=2000, help="Tokens of a prompt. Default: 2000.")
    parser.add_argument("--prompts", type=int, default=2, help="How many prompts. Default: 2.")
    parser.add_argument("--dtype", default="auto", help="As SGLang's --dtype: the one that engines will use.")
    parser.add_argument("--check-layer", type=int, default=1, help="As --polarkv-blend-check-layer.")
    parser.add_argument("--metric", choices=("v", "k", "kv"), default="v", help="As --polarkv-blend-metric.")
    parser.add_argument(
        "--strategy", choices=("deviation", "first"), default="deviation", help="As --polarkv-blend-strategy."
    )
    parser.add_argument("--stages", default="", help="As --polarkv-blend-stages.")
    parser.add_argument(
        "--ratio",
        type=float,
        default=0.15,
        help="As --polarkv-blend-ratio: what --stages narrow from. Default: 0.15.",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="Draw what was measured, as a PNG.")
    parser.add_argument("--verdicts", metavar="DIR", help="As --polarkv-blend-verdicts.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, print, write the verdict; 0 if it passed, else 1."""
    if args.check_layer < 1:
        raise ConfigError(
            f"--check-layer {args.check_layer}; layer 0 knows no context, 1 is the first that does"
        )
    if args.tokens < 400 or args.prompts < 1:
        raise ConfigError(f"{args.prompts} prompts of {args.tokens} tokens; at least 1 of 400 are needed")
    if not 0 <= args.ratio <= 1:
        raise ConfigError(f"--ratio {args.ratio}; a share of the reused tokens, 0 to 1, is needed")
    if args.plot is not None:
        _require_plot(args.plot)
    import sglang
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from polarkv_sglang.blend.check import RATIOS, batteries, compare, judge
    from polarkv_sglang.blend.curve import draw
    from polarkv_sglang.blend.offline import OfflineModel
    from polarkv_sglang.blend.select import Selection
    from polarkv_sglang.blend.stages import parse_stages, require_layers
    from polarkv_sglang.blend.verdict import Verdict, verdict_path, verdicts_folder, write_verdict

    stages = parse_stages(args.check_layer, args.ratio, args.stages)
    selection = Selection(stages, args.metric, args.strategy)
    prompts = list(batteries(get_tokenizer(args.model).encode, args.tokens, args.prompts))
    model = OfflineModel(args.model, max_tokens=4 * args.tokens + 256, dtype=args.dtype)
    require_layers(stages, len(model.model.layers))
    path = verdict_path(verdicts_folder(args.verdicts), model.runner, selection)
    found = [compare(model, battery, selection, RATIOS) for battery in prompts]
    reasons = judge(model.runner.dtype, RATIOS, found)
    rows = [_summary(ratio, [each[at] for each in found]) for at, ratio in enumerate(RATIOS)]
    _show(rows, as_json=args.json)
    if args.plot is not None:
        draw(rows, args.plot, f"CacheBlend on {Path(args.model).name}, prompts of {args.tokens:,} tokens")
    write_verdict(
        path,
        Verdict(
            model=args.model, passed=not reasons, reasons=reasons, ratios=rows, sglang=sglang.__version__
        ),
    )
    if not args.json:
        print("\n".join(reasons) or "passed", f"verdict: {path}", sep="\n")
    return 1 if reasons else 0


def _require_plot(path: Path) -> None:
    """Say what is missing before the minutes that the check takes, not after them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--plot needs matplotlib: pip install 'polarkv-sglang[examples]', or leave it out ({error})"
        ) from error
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}; make it or name another")


def _summary(ratio: float, found: list[Compared]) -> dict[str, float]:
    """Means over prompts, and the median speed-up."""
    return {
        "ratio": ratio,
        "layer_tokens": sum(each.layer_tokens for each in found) // len(found),
        **{
            name: statistics.fmean(getattr(each, name) for each in found)
            for name in ("k_error", "v_error", "kl", "top1_agreement")
        },
        "cpu_speedup": statistics.median(each.cpu_speedup for each in found),
    }


def _show(rows: list[dict[str, float]], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    print(*(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print(*(f"{value:>14,}" if isinstance(value, int) else f"{value:>14.4g}" for value in row.values()))
