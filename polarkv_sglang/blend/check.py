"""Blended passes of a model against full prefills: prompts of real documents in another order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pydoc_data.topics import topics
from typing import Final, NamedTuple

import torch

from polarkv_sglang.blend.offline import OfflineModel, Prefilled
from polarkv_sglang.blend.plan import Plan
from polarkv_sglang.blend.select import Selection, chosen_rows
from polarkv_sglang.errors import ConfigError

RATIOS: Final = (0.0, 0.05, 0.15, 0.3, 1.0)
DOCUMENTS: Final = 8
_HEAD: Final = "Answer the question from these chapters of a manual.\n\n"
_QUESTION: Final = (
    "\n\nQuestion: which of these chapters explains how values are compared, and what does it say about "
    "objects of different types? Answer in one sentence.\nAnswer:"
)
# Of the largest logit. Half precision rounds other batch shapes otherwise.
_LOGITS: Final = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}
_KEYS_OF_LAYER_0: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SLACK: Final = 1.02  # errors are compared across ratios with it, for half precision


class Compared(NamedTuple):
    """A blended prefill against the full one. Errors are relative, over all layers of rows with cached KV."""

    layer_tokens: int  # rows times layers that were computed
    k_error: float
    v_error: float
    first_k_error: float  # of layer 0, whose keys depend on token and position alone
    kl: float  # nats, mean over the question's tokens
    top1_agreement: float  # share of the question's tokens
    logits: float  # largest difference, in units of the largest logit
    cpu_speedup: float  # CPU seconds of the full pass by those of this one


class Battery(NamedTuple):
    """One prompt that was seen, and one with its documents in another order."""

    seen: list[int]
    asked: list[int]
    moves: list[tuple[int, int, int]]  # start in seen, end in seen, start in asked
    tail: int  # tokens of the question


def batteries(encode: Callable[[str], list[int]], tokens: int, count: int) -> Iterator[Battery]:
    """``count`` prompts of about ``tokens`` tokens, from chapters of the manual that every Python carries.

    Raises ConfigError where eight chapters are not so long.
    """
    head, question = encode(_HEAD), encode(_QUESTION)
    around = len(head) + len(question)
    length = (tokens - around) // DOCUMENTS
    chapters = [encode(topics[name]) for name in sorted(topics)]
    longest = sorted(map(len, chapters))[-DOCUMENTS]
    if length > longest:
        most = around + DOCUMENTS * longest
        raise ConfigError(f"--tokens {tokens}: the manual has eight chapters for up to {most} tokens")
    chapters = [ids for ids in chapters if len(ids) >= length]
    for number in range(count):
        draw = random.Random(number)
        documents = [ids[:length] for ids in draw.sample(chapters, DOCUMENTS)]
        order = list(range(DOCUMENTS))
        while any(at == place for at, place in enumerate(order)):
            draw.shuffle(order)
        starts = [len(head) + length * at for at in range(DOCUMENTS)]
        yield Battery(
            seen=[*head, *chain(*documents)],
            asked=[*head, *chain(*(documents[at] for at in order)), *question],
            moves=[(starts[at], starts[at] + length, starts[place]) for place, at in enumerate(order)],
            tail=len(question),
        )


def compare(
    model: OfflineModel, battery: Battery, selection: Selection, ratios: Sequence[float]
) -> list[Compared]:
    """One comparison a ratio; the full pass runs before and after them, and counts with its mean time."""
    model.clear()
    donor = model.prefill(battery.seen)
    pieces = [donor.pieces(start, end, at) for start, end, at in battery.moves]
    plan = Plan(pieces)
    rows = torch.cat([torch.arange(piece.start, piece.end) for piece in pieces])
    full = model.prefill(battery.asked, tail=battery.tail)
    exact = model.kv(full.slots[rows])
    found = []
    for ratio in ratios:
        blended = model.prefill(
            battery.asked, plan=plan, selection=selection.with_ratio(ratio), tail=battery.tail
        )
        found.append(_compared(model, blended, full, exact, rows, selection.with_ratio(ratio)))
        model.forget(blended)
    cpu_seconds = (full.cpu_seconds + model.prefill(battery.asked).cpu_seconds) / 2
    scale = cpu_seconds / full.cpu_seconds
    return [each._replace(cpu_speedup=each.cpu_speedup * scale) for each in found]


def _compared(
    model: OfflineModel,
    blended: Prefilled,
    full: Prefilled,
    exact: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    selection: Selection,
) -> Compared:
    keys, values = model.kv(blended.slots[rows])
    mine, theirs = blended.logits.log_softmax(-1), full.logits.log_softmax(-1)
    return Compared(
        layer_tokens=_layer_tokens(len(blended.tokens), sum(blended.counts), selection, len(keys)),
        k_error=_relative(keys, exact[0]),
        v_error=_relative(values, exact[1]),
        first_k_error=_relative(keys[0], exact[0][0]),
        kl=float((theirs.exp() * (theirs - mine)).sum(-1).mean()),
        top1_agreement=float((mine.argmax(-1) == theirs.argmax(-1)).float().mean()),
        logits=float((blended.logits - full.logits).abs().max() / full.logits.abs().max()),
        cpu_speedup=full.cpu_seconds / blended.cpu_seconds,
    )


def _layer_tokens(tokens: int, cached: int, selection: Selection, layers: int) -> int:
    """Rows times layers that a pass over so many tokens computes, of which ``cached`` have known KV."""
    borders = [*(stage.layer for stage in selection.stages), layers]
    narrow = sum(
        (end - stage.layer) * (tokens - cached + chosen_rows(cached, stage.ratio))
        for stage, end in zip(selection.stages, borders[1:], strict=True)
    )
    return borders[0] * tokens + narrow


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def judge(dtype: torch.dtype, ratios: Sequence[float], found: Sequence[Sequence[Compared]]) -> list[str]:
    """What is wrong, from the comparisons of each battery; nothing if the model blends rightly.

    What is not a number is within no limit.
    """
    reasons = []
    for number, compared in enumerate(found):
        where = f"prompt {number + 1}"
        naive = compared[0]
        if not naive.first_k_error <= _KEYS_OF_LAYER_0[dtype]:
            reasons.append(f"{where}: rotated keys of layer 0 are off by {naive.first_k_error:.2g}")
        if ratios[-1] == 1.0 and not compared[-1].logits <= _LOGITS[dtype]:
            reasons.append(f"{where}: at ratio 1 logits are off by {compared[-1].logits:.2g} of the largest")
        for one, other, less, more in zip(ratios, ratios[1:], compared, compared[1:]):
            for name in ("k_error", "v_error"):
                before, after = getattr(less, name), getattr(more, name)
                if not after <= _SLACK * before:
                    reasons.append(
                        f"{where}: {name} rises from {before:.3g} at {one} to {after:.3g} at {other}"
                    )
    return reasons
