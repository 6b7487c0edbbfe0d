"""CacheBlend in one run: quality and speed of its passes, and times to first token over HTTP.

First ``polarkv blend-check`` with one thread. Then, for each number of threads, an engine that wants its
verdict is asked for prompts of eight documents in other orders than it has seen: each blended, and then in
full, since a blended one leaves nothing that the full one could use; the next in another order.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import NamedTuple

from tokenizers import Tokenizer

from examples.common.processes import Process, engine, free_ports, say, unwind_on_signals
from examples.smollm2 import DEFAULT_TARGET
from polarkv_sglang.errors import PolarError

DOCUMENTS = 8
TOKENS = 4000
PAIRS = 3
RATIO = 0.15
THREADS = (1, 2)
HEAD, QUESTION = "Answer from these chapters.\n\n", "\n\nWhat is compared here? Answer:"


class BlendFailed(PolarError):
    """Something was not computed as it was to be measured."""


class Pair(NamedTuple):
    """One prompt, asked blended and then in full; seconds to the first token."""

    threads: int  # of the engine
    prompt_tokens: int
    blended_tokens: int  # that took their KV from elsewhere
    recomputed_tokens: int  # that could have and were computed
    blended_s: float
    full_s: float


class Measured(NamedTuple):
    """All that one run finds."""

    commit: str
    machine: str
    check_threads: int
    tokens: int
    ratio: float  # of the pairs
    check: list[dict[str, float]]  # one object a ratio, as polarkv blend-check prints them
    pairs: list[Pair]


def environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


def check(model: Path, tokens: int, verdicts: Path, plot: Path | None) -> list[dict[str, float]]:
    """The curve of one prompt, on one thread. Raises BlendFailed."""
    command = [sys.executable, "-m", "polarkv_sglang.cli", "blend-check", str(model), "--dtype", "float32"]
    command += ["--json", "--prompts", "1", "--tokens", str(tokens), "--verdicts", str(verdicts)]
    command += ["--plot", str(plot)] if plot is not None else []
    done = subprocess.run(
        command, env={**os.environ, **environment(1)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BlendFailed(f"the model did not pass its check\n{done.stdout}{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def documents(tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Eight texts of ``length`` tokens, of the manual that every Python carries."""
    chapters = (tokenizer.encode(topics[name], add_special_tokens=False).ids for name in sorted(topics))
    return random.Random(0).sample([ids[:length] for ids in chapters if len(ids) >= length], DOCUMENTS)


def orders(count: int) -> Iterator[list[int]]:
    """Orders that no two, nor the first one seen, begin alike: else a prompt had a prefix of another."""
    draw = random.Random(0)
    for first in itertools.islice(range(1, DOCUMENTS), count):
        order = list(range(DOCUMENTS))
        while order[0] != first or any(at == place for place, at in enumerate(order)):
            draw.shuffle(order)
        yield order


def ask(port: int, tokens: list[int], **custom: object) -> tuple[float, dict[str, int]]:
    """Seconds to the first token, which is the only one, and where the prompt's tokens came from."""
    parameters = {"temperature": 0, "max_new_tokens": 1, "custom_params": custom or None}
    body = json.dumps({"input_ids": tokens, "sampling_params": parameters})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        started = time.perf_counter()
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        reply = json.loads(connection.getresponse().read())
        return time.perf_counter() - started, reply["meta_info"]["polarkv"]
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise BlendFailed(f"the engine did not answer: {error!r}") from error
    finally:
        connection.close()


def measure(port: int, model: Path, threads: int, tokens: int, count: int) -> Iterator[Pair]:
    """Ask an engine. Raises BlendFailed."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    head, question = (tokenizer.encode(text, add_special_tokens=False).ids for text in (HEAD, QUESTION))
    texts = documents(tokenizer, (tokens - len(head) - len(question)) // DOCUMENTS)
    ask(port, [*head, *itertools.chain(*texts)])
    for order in orders(count):
        asked = [*head, *itertools.chain(*(texts[at] for at in order)), *question]
        blended_s, mixed = ask(port, asked, polarkv_blend=True, polarkv_blend_ratio=RATIO)
        full_s, whole = ask(port, asked)
        reusable = mixed["blended"] + mixed["recomputed"]
        if reusable < 0.9 * len(asked) or whole["blended"] or whole["computed"] < 0.9 * len(asked):
            raise BlendFailed(f"blended {mixed}, in full {whole}")
        yield Pair(threads, len(asked), mixed["blended"], mixed["recomputed"], blended_s, full_s)


def engine_flags(tokens: int, verdicts: Path) -> list[str]:
    """A pool of L1 in which all prompts of a run stay."""
    flags = ["--dtype", "float32", "--max-total-tokens", str(5 * tokens + 1024)]
    flags += ["--chunked-prefill-size", str(2 * tokens), "--enable-polarkv", "--polarkv-blend"]
    return [*flags, "--polarkv-blend-verdicts", str(verdicts)]


def run(args: argparse.Namespace) -> Measured:
    """Measure; every process has ended when this returns or raises."""
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        verdicts = Path(folder)
        say("checking the model, on one thread")
        rows = check(args.model, args.tokens, verdicts, args.plot)
        for threads in args.threads:
            (port,) = free_ports(1)
            name, flags = f"engine of {threads} threads", engine_flags(args.tokens, verdicts)
            log = args.logs / f"blend_{threads}.log"
            served: Process = engine(name, args.model, port, flags, log, environment(threads))
            say(f"starting the {name}")
            served.start()
            try:
                served.wait_until_ready()
                for pair in measure(port, args.model, threads, args.tokens, args.pairs):
                    say(f"blended {pair.blended_s:.1f} s, in full {pair.full_s:.1f} s")
                    pairs.append(pair)
            finally:
                served.stop()
    return Measured(commit(), machine(), 1, args.tokens, RATIO, rows, pairs)


def commit() -> str:
    """Of the code that ran, with -dirty if it was changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """The processor and how many of its cores there are."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


def summary(found: Measured) -> str:
    """Two tables, in Markdown."""
    naive = found.check[0]
    lines = [
        f"commit {found.commit}; {found.machine}",
        "",
        f"One prompt of {found.tokens:,} tokens, {found.check_threads} thread:",
        "",
        "| ratio | rows × layers | K error | V error | V error against ratio 0 | KL, nats "
        "| next token agrees | CPU seconds: full over blended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found.check:
        less = 1 - row["v_error"] / naive["v_error"]
        lines.append(
            f"| {row['ratio']:g} | {row['layer_tokens']:,} | {row['k_error']:.3f} | {row['v_error']:.3f} | "
            f"-{100 * less:.0f} % | {row['kl']:.4f} | {100 * row['top1_agreement']:.0f} % | "
            f"{row['cpu_speedup']:.1f} |"
        )
    lines += [
        "",
        f"Time to first token over HTTP, {found.pairs[0].prompt_tokens:,} tokens, ratio {found.ratio}:",
        "",
        "| threads | blended, s | in full, s | times lower: median | each pair |",
        "|---|---|---|---|---|",
    ]
    for threads, group in itertools.groupby(found.pairs, key=lambda pair: pair.threads):
        lines.append(_times(threads, list(group)))
    return "\n".join(lines)


def _times(threads: int, pairs: Sequence[Pair]) -> str:
    each = [pair.full_s / pair.blended_s for pair in pairs]
    columns = [
        ", ".join(f"{pair.blended_s:.1f}" for pair in pairs),
        ", ".join(f"{pair.full_s:.1f}" for pair in pairs),
        f"{median(each):.1f}",
        ", ".join(f"{times:.1f}" for times in each),
    ]
    return f"| {threads} | {' | '.join(columns)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blend", description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=DEFAULT_TARGET, help="as made by python -m examples.smollm2")
    option("--tokens", type=int, default=TOKENS, help="of a prompt; default: %(default)s")
    option("--pairs", type=int, default=PAIRS, help="prompts for each engine; default: %(default)s")
    option("--threads", type=int, nargs="+", default=THREADS, help="of the engines; default: 1 2")
    option("--plot", type=Path, help="as of polarkv blend-check")
    option("--json", type=Path, help="file for all figures")
    option("--logs", type=Path, default=Path("build/blend"), help="folder for the engines' logs")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"there is no {args.model}; python -m examples.smollm2 makes it")
    if args.tokens < 400 or not 1 <= args.pairs < DOCUMENTS or min(args.threads) < 1:
        parser.error(f"--tokens is at least 400, --pairs 1 to {DOCUMENTS - 1}, --threads at least 1 each")
    unwind_on_signals()
    args.logs.mkdir(parents=True, exist_ok=True)
    try:
        found = run(args)
    except PolarError as error:
        print(f"The benchmark failed: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        whole = {**found._asdict(), "pairs": [pair._asdict() for pair in found.pairs]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
