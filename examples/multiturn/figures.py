"""From answers to figures: percentiles, rates, and ratios with their spread over the repeats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

import msgspec
import numpy as np

from examples.multiturn.load import Answer, Streamed


class HitTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that a cache had, by tier."""

    l1: int
    l2: int
    l3: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One system in one run; NaN is written as null where every request failed."""

    scenario: str
    preset: str
    system: str
    ttft_p50_s: float
    ttft_mean_s: float
    ttft_p99_s: float
    output_tokens_per_s: float
    hit_tokens: HitTokens
    outputs_equal: bool  # to the baseline's, all of them
    requests: int
    failed: int


class Spread(msgspec.Struct, frozen=True):
    """A ratio over the repeats of a run; with one repeat all three are the same."""

    median: float
    low: float
    high: float
    repeats: int


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """What Figures leaves out of one system."""

    system: str
    ttft_p90_s: float
    token_gap_mean_s: float  # inter-token latency
    token_gap_p99_s: float
    prompt_tokens: int
    first_round_ttft_mean_s: float
    later_rounds_ttft_mean_s: float
    late_requests: int  # sent more than 50 ms after they were due, for want of the session's last answer
    ttft_ratio: Mapping[str, Spread]  # by other system: its mean TTFT over this one's
    throughput_ratio: Mapping[str, Spread]  # this one's tokens a second over the other's
    differences: tuple[str, ...]
    errors: tuple[str, ...]


class Played(NamedTuple):
    """One play of all turns on one system."""

    answers: list[Answer]

    @property
    def streamed(self) -> list[Streamed]:
        return [answer.streamed for answer in self.answers if answer.streamed is not None]

    @property
    def first_round_hits(self) -> int:
        """Prompt tokens of the first round that a cache had; of fresh conversations it can have none."""
        first = (answer.streamed for answer in self.answers if answer.round == 0)
        return sum(one.hits.device + one.hits.host + one.hits.storage for one in first if one is not None)

    @property
    def ttft_mean_s(self) -> float:
        return _mean(one.ttft_s for one in self.streamed)

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens that came, over the time from the first request's sending to the last one's end."""
        tokens = sum(len(one.output_ids) for one in self.streamed)
        if not tokens:
            return float("nan")
        lasted_s = max(one.ended_s for one in self.answers) - min(one.sent_s for one in self.answers)
        return tokens / lasted_s


_LATE_S = 0.05


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between ranks, as numpy's; NaN of nothing."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def spread(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The ratio in each repeat: of what was measured side by side, not of medians of different moments."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return Spread(median(ratios), min(ratios), max(ratios), len(ratios))


def differences(baseline: Sequence[Played], other: Sequence[Played]) -> list[str]:
    """The turns whose greedy output differs from the baseline's; what failed is not compared."""
    found = []
    for number, (expected, played) in enumerate(zip(baseline, other, strict=True)):
        outputs = {
            (answer.session, answer.round): answer.streamed.output_ids
            for answer in expected.answers
            if answer.streamed is not None
        }
        for answer in played.answers:
            wanted = outputs.get((answer.session, answer.round))
            if answer.streamed is not None and wanted is not None and answer.streamed.output_ids != wanted:
                found.append(f"repeat {number}, session {answer.session}, round {answer.round}")
    return found


def figures(
    scenario: str, preset: str, system: str, plays: Sequence[Played], baseline: Sequence[Played]
) -> Figures:
    """All repeats of one system together."""
    streamed = [one for play in plays for one in play.streamed]
    ttfts = [one.ttft_s for one in streamed]
    requests = sum(len(play.answers) for play in plays)
    return Figures(
        scenario=scenario,
        preset=preset,
        system=system,
        ttft_p50_s=percentile(ttfts, 50),
        ttft_mean_s=_mean(ttfts),
        ttft_p99_s=percentile(ttfts, 99),
        output_tokens_per_s=_mean(play.output_tokens_per_s for play in plays),
        hit_tokens=HitTokens(
            l1=sum(one.hits.device for one in streamed),
            l2=sum(one.hits.host for one in streamed),
            l3=sum(one.hits.storage for one in streamed),
        ),
        outputs_equal=not differences(baseline, plays),
        requests=requests,
        failed=requests - len(streamed),
    )


def details(system: str, baseline: str, all_plays: Mapping[str, Sequence[Played]]) -> Details:
    """What Figures leaves out; ratios are to every other system of the run."""
    plays = all_plays[system]
    answers = [answer for play in plays for answer in play.answers]
    streamed = [one for play in plays for one in play.streamed]
    gaps = [gap for one in streamed for gap in one.token_gaps_s]
    others = {name: others for name, others in all_plays.items() if name != system}
    return Details(
        system=system,
        ttft_p90_s=percentile([one.ttft_s for one in streamed], 90),
        token_gap_mean_s=_mean(gaps),
        token_gap_p99_s=percentile(gaps, 99),
        prompt_tokens=sum(one.prompt_tokens for one in streamed),
        first_round_ttft_mean_s=_mean(ttfts(answers, first=True)),
        later_rounds_ttft_mean_s=_mean(ttfts(answers, first=False)),
        late_requests=sum(answer.late_s > _LATE_S for answer in answers),
        ttft_ratio={
            name: spread([play.ttft_mean_s for play in other], [play.ttft_mean_s for play in plays])
            for name, other in others.items()
        },
        throughput_ratio={
            name: spread(
                [play.output_tokens_per_s for play in plays], [play.output_tokens_per_s for play in other]
            )
            for name, other in others.items()
        },
        differences=tuple(differences(all_plays[baseline], plays)),
        errors=tuple(answer.error for answer in answers if answer.error),
    )


def ttfts(answers: Iterable[Answer], *, first: bool) -> list[float]:
    """TTFTs of the first round, which nobody has a history of, or of all later ones."""
    return [
        answer.streamed.ttft_s
        for answer in answers
        if answer.streamed is not None and (answer.round == 0) == first
    ]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fmean(values) if values else float("nan")
