"""What a benchmark plays and on which sizes of the tiers: all of it fixed before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from polarkv_sglang.errors import ConfigError

PresetName = Literal["published", "laptop"]


class Conversations(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions that each begin with a long history and then ask and hear in turns."""

    sessions: int
    rounds: int
    history_tokens: int
    question_tokens: int  # about so many where the text is real
    answer_tokens: int  # generated, at most
    real_text: bool = False  # else random tokens
    vocabulary: int = 100_000  # random tokens are below it
    think_s: float = 0.0  # seconds from an answer to the same session's next question, at least

    @property
    def final_tokens(self) -> int:
        """Tokens of one session after its last answer."""
        return self.history_tokens + self.rounds * (self.question_tokens + self.answer_tokens)

    @property
    def working_set_tokens(self) -> int:
        """Tokens of all sessions after their last answers."""
        return self.sessions * self.final_tokens

    @property
    def requests(self) -> int:
        return self.sessions * self.rounds


class TierSizes(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens of KV each tier holds, and the bytes of one token's KV over all ranks."""

    l1_tokens: int
    l2_tokens: int
    l3_tokens: int
    token_bytes: int

    @property
    def l2_ratio(self) -> float:
        return self.l2_tokens / self.l1_tokens

    @property
    def l3_bytes(self) -> int:
        return self.l3_tokens * self.token_bytes


def from_gigabytes(l1: float, l2: float, l3: float, token_bytes: int, page_tokens: int) -> TierSizes:
    """Sizes given in 10^9 bytes of KV, in whole pages."""

    def whole_pages(gigabytes: float) -> int:
        return int(gigabytes * 1e9 / token_bytes) // page_tokens * page_tokens

    return TierSizes(
        l1_tokens=whole_pages(l1),
        l2_tokens=whole_pages(l2),
        l3_tokens=whole_pages(l3),
        token_bytes=token_bytes,
    )


def scaled(sizes: TierSizes, scale: float, token_bytes: int, page_tokens: int) -> TierSizes:
    """The same proportions, ``scale`` times as many tokens, in whole pages (rounded)."""

    def whole_pages(tokens: int) -> int:
        return round(tokens * scale / page_tokens) * page_tokens

    return TierSizes(
        l1_tokens=whole_pages(sizes.l1_tokens),
        l2_tokens=whole_pages(sizes.l2_tokens),
        l3_tokens=whole_pages(sizes.l3_tokens),
        token_bytes=token_bytes,
    )


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of a scenario.

    Arrivals are open loop at ``qps`` requests a second, or, where that is None, at ``load`` times the rate
    at which this machine answers requests with fresh histories one by one, measured when the run begins.
    """

    name: PresetName
    model: str  # a path or a name that SGLang loads; of a laptop preset made by ``prepare`` where missing
    prepare: Callable[[Path], Path] | None = None
    conversations: Conversations
    tiers: TierSizes
    page_tokens: int
    qps: float | None = None
    load: float = 1.0
    published_qps: float | None = None
    tp: int = 1
    repeats: int
    # Seconds that a run should take at most. Where servers run at once, no repeat but the first is begun that
    # would end later; where they run one after another, fewer rounds are played, but not below min_rounds
    # (None: all of them).
    limit_s: float | None = None
    min_rounds: int | None = None
    at_once: bool  # whether the servers of all systems fit on the machine together
    engine_flags: tuple[str, ...] = ()
    start_timeout_s: float = 240.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        if (self.qps is None) == (self.load <= 0):
            raise ConfigError(f"preset {self.name}: give either qps or a load above 0")
        if self.conversations.final_tokens > self.tiers.l1_tokens:
            raise ConfigError(
                f"a session grows to {self.conversations.final_tokens} tokens and L1 holds "
                f"{self.tiers.l1_tokens}; play fewer rounds"
            )


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What a laptop run is meant to show; None: nothing is demanded."""

    ttft_ratio: float | None = None  # mean TTFT of the baseline over PolarKV's, at least
    throughput_gain: float | None = None  # PolarKV's tokens a second over the baseline's, less 1, at least
    restored_to_l1: float | None = None  # TTFT restored from L3 over that of an L1 hit, at most


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A published benchmark."""

    name: str
    title: str
    published: Preset
    laptop: Preset
    published_result: str
    goal: Goal = Goal()

    def preset(self, name: PresetName) -> Preset:
        return self.published if name == "published" else self.laptop
