"""Whether a laptop run reached its goals, and the measured bound where it did not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from examples.multiturn.figures import Played, spread, ttfts
from examples.multiturn.presets import Scenario
from examples.multiturn.probe import copy_seconds
from examples.multiturn.runner import Results
from examples.multiturn.systems import BASELINE, POLARKV, POLARKV_DIRECT, SYSTEMS


class Verdict(NamedTuple):
    """One goal: what was wanted, what was measured, and what bounds it where it was missed."""

    goal: str
    measured: str
    reached: bool
    bound: str

    def line(self) -> str:
        text = f"{'reached' if self.reached else 'NOT REACHED'}: {self.goal}: {self.measured}"
        return text if self.reached else f"{text}\n    {self.bound}"


def verdicts(scenario: Scenario, results: Results) -> list[Verdict]:
    """Of all goals that the systems of the run allow to judge; none for another preset than laptop."""
    goal, plays = scenario.goal, results.plays
    if results.preset.name != "laptop" or POLARKV not in plays:
        return []
    found = []
    if goal.ttft_ratio is not None:
        found += _ttft_goals(goal.ttft_ratio, results)
    if goal.throughput_gain is not None and BASELINE in plays:
        found.append(_throughput_goal(goal.throughput_gain, results))
    if goal.restored_to_l1 is not None and POLARKV in results.restores:
        found += _restore_goals(goal.restored_to_l1, results)
    return found


def _ttft_goals(wanted: float, results: Results) -> list[Verdict]:
    plays = results.plays
    mine = _mean_ttft(plays[POLARKV])
    found = []
    if BASELINE in plays:
        measured = spread(*([play.ttft_mean_s for play in plays[name]] for name in (BASELINE, POLARKV)))
        found.append(
            Verdict(
                f"mean TTFT at least {wanted}x lower than {SYSTEMS[BASELINE].label}",
                f"{measured.median:.2f}x ({measured.low:.2f} to {measured.high:.2f})",
                measured.median >= wanted,
                _ttft_bound(results),
            )
        )
    others = {name: _mean_ttft(other) for name, other in plays.items() if name not in _OURS}
    if others:
        best = min(others, key=others.__getitem__)
        found.append(
            Verdict(
                "mean TTFT ahead of every other system in the run",
                f"{mine:.3f} s, {SYSTEMS[best].label} {others[best]:.3f} s",
                mine < others[best],
                _ttft_bound(results),
            )
        )
    return found


def _ttft_bound(results: Results) -> str:
    """The ratio if every later round had been as fast as an L1 hit: first rounds are computed by everyone."""
    answers = [answer for play in results.plays[POLARKV] for answer in play.answers]
    first, later = ttfts(answers, first=True), ttfts(answers, first=False)
    text = f"first rounds, which everyone computes, took {fmean(first):.3f} s in the mean" if first else ""
    restored = results.restores.get(POLARKV)
    if not (first and later and restored and restored.prompts and BASELINE in results.plays):
        return f"bound: {text or 'nothing was measured that would give one'}"
    best = (sum(first) + len(later) * restored.l1_ttft_s) / (len(first) + len(later))
    ratio = _mean_ttft(results.plays[BASELINE]) / best
    return f"bound: {text}; with an idle L1 hit ({restored.l1_ttft_s:.3f} s) in all others: {ratio:.2f}x"


def _throughput_goal(wanted: float, results: Results) -> Verdict:
    measured = spread(
        *([play.output_tokens_per_s for play in results.plays[name]] for name in (POLARKV, BASELINE))
    )
    rounds = results.preset.conversations.rounds
    offered = _offered_tokens_per_s(results.plays[POLARKV])
    baseline = fmean(play.output_tokens_per_s for play in results.plays[BASELINE])
    return Verdict(
        f"tokens/s at least {wanted:+.0%} over {SYSTEMS[BASELINE].label}",
        f"{measured.median - 1:+.0%} ({measured.low - 1:+.0%} to {measured.high - 1:+.0%})",
        measured.median >= 1 + wanted,
        f"bound: the first of {rounds} rounds is computed by everyone, so {rounds - 1:+.0%} at best; the"
        f" arrivals themselves brought {offered:.1f} tokens/s, {offered / baseline - 1:+.0%}",
    )


def _offered_tokens_per_s(plays: Sequence[Played]) -> float:
    """Tokens a second if every answer had come at once when its request was due."""
    rates = []
    for play in plays:
        due = [answer.sent_s - answer.late_s for answer in play.answers]
        tokens = sum(len(one.output_ids) for one in play.streamed)
        rates.append(tokens / max(max(due) - min(due), 1e-9))
    return fmean(rates)


def _restore_goals(wanted: float, results: Results) -> list[Verdict]:
    ours = {name: results.restores[name] for name in _OURS if name in results.restores}
    restored = {name: restore for name, restore in ours.items() if restore.prompts}
    if not restored:
        missed = sum(restore.missed for restore in ours.values())
        return [Verdict("prompts restored from L3", f"none of {missed}", False, "bound: none measured")]
    mode = min(restored, key=lambda name: restored[name].ratio)
    mine = restored[mode]
    length = results.preset.tiers.token_bytes * results.preset.conversations.history_tokens
    copied_s = copy_seconds(length)
    copies = 2 if mode == POLARKV else 1
    bound = 1 + copies * copied_s / mine.l1_ttft_s
    found = [
        Verdict(
            f"TTFT restored from L3 at most {wanted} times that of an L1 hit",
            f"{SYSTEMS[mode].label} {mine.ratio:.2f} times"
            f" ({mine.restored_ttft_s:.3f} s, L1 hit {mine.l1_ttft_s:.3f} s)",
            mine.ratio <= wanted,
            f"bound: a history's KV ({length / 1e6:.0f} MB) is copied {copies}x on its way to L1; one memcpy"
            f" of it takes {copied_s:.4f} s here, so {bound:.2f} times at best",
        )
    ]
    others = {
        name: other.restored_ttft_s
        for name, other in results.restores.items()
        if name not in _OURS and other.prompts
    }
    if others:
        best = min(others, key=others.__getitem__)
        found.append(
            Verdict(
                "TTFT restored from L3 ahead of every other L3 in the run",
                f"{mine.restored_ttft_s:.3f} s, {SYSTEMS[best].label} {others[best]:.3f} s",
                mine.restored_ttft_s < others[best],
                f"bound: an L1 hit takes {mine.l1_ttft_s:.3f} s on PolarKV",
            )
        )
    return found


_OURS = (POLARKV, POLARKV_DIRECT)


def _mean_ttft(plays: Sequence[Played]) -> float:
    """As Figures has it: over all requests of all repeats."""
    return fmean(one.ttft_s for play in plays for one in play.streamed)
