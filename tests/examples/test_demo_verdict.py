"""The demo fails if greedy outputs differ, or if nothing came from the pool."""

from __future__ import annotations

import pytest

from examples.demo.__main__ import verdict
from examples.demo.play import Demo
from tests.examples.byte_tokenizer import byte_tokenizer
from tests.examples.streaming import Event, streaming, tokens

TIERS = ("prompt", "l1", "l2", "l3", "l4", "blended", "computed")


class Engine:
    """Answers all prompts alike, and has them in L1 from then on."""

    def __init__(self, *, says: int, says_on_hit: int) -> None:
        self.says = says
        self.says_on_hit = says_on_hit
        self.tier = "computed"  # where prompts come from that are not in L1
        self._l1: set[tuple[int, ...]] = set()

    def answer(self, prompt: list[int]) -> list[Event]:
        hit = tuple(prompt) in self._l1
        self._l1.add(tuple(prompt))
        tiers = dict.fromkeys(TIERS, 0) | {"l1" if hit else self.tier: len(prompt), "prompt": len(prompt)}
        return [tokens(self.says_on_hit if hit else self.says, polarkv=tiers)]

    def restart(self, tier: str) -> None:
        self.tier = tier
        self._l1.clear()


@pytest.mark.parametrize(
    ("plain", "hit", "restored_from", "failure"),
    [
        (7, 7, "l3", None),
        (8, 7, "l3", "greedy outputs differ: first compound turn 1: PolarKV 'x', plain 'x'"),
        (7, 8, "l3", "greedy outputs differ: first compound turn 1: PolarKV 'x', L1 hit 'x'"),
        (7, 7, "computed", "the restarted engine took no prefix from the pool"),
    ],
    ids=["equal", "plain differs", "a hit differs", "nothing restored"],
)
def test_a_difference_or_no_restored_prompt_fails_the_demo(
    plain: int, hit: int, restored_from: str, failure: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    polarkv, other = Engine(says=7, says_on_hit=hit), Engine(says=plain, says_on_hit=plain)
    with streaming(polarkv.answer) as ours, streaming(other.answer) as theirs:
        demo = Demo(byte_tokenizer(), 1, *(int(each.url.rpartition(":")[2]) for each in (ours, theirs)))
        demo.play_round("first")
        polarkv.restart(restored_from)
        demo.play_round("after_restart", again=True)
    assert verdict(demo) == (0 if failure is None else 1)
    said = capsys.readouterr().err
    assert f"The demo failed: {failure}" in said if failure is not None else not said
