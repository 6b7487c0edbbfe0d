"""Playing the conversations on both engines and measuring them."""

from __future__ import annotations

from itertools import islice

from tokenizers import Tokenizer

from examples.common.client import Reply, Tiers, generate
from examples.common.conversations import CONVERSATIONS, Session, fresh_prompts
from examples.common.processes import say
from examples.demo.report import Phase, Turn
from polarkv_sglang.errors import PolarError

PAGE_TOKENS = 16
MAX_NEW_TOKENS = 16
WAKE_TOKENS = 32
WARM_UP_TOKENS = 512
NO_HIT_TOKENS = 256  # one pair takes too short for the machine to change much, and many fit in
NO_HIT_PAIRS = 30


class DemoFailed(PolarError):
    """The demo ran but did not show what it should."""


class Demo:
    """Two engines on one machine, of which one at a time gets a request: with PolarKV, and plain."""

    def __init__(self, tokenizer: Tokenizer, sessions: int, polarkv_port: int, plain_port: int) -> None:
        self.turns: list[Turn] = []
        self.no_hit_ratios: list[float] = []
        self.differences: list[str] = []
        self._tokenizer = tokenizer
        self._polarkv_port = polarkv_port
        self._plain_port = plain_port
        self._sessions = [Session(conversation, tokenizer) for conversation in CONVERSATIONS[:sessions]]
        self._last_replies: dict[str, Reply] = {}
        self._starts = 0
        self._wake_prompts = fresh_prompts(tokenizer, WAKE_TOKENS, seed=0)

    def warm_up(self, *, both: bool) -> None:
        """A fresh prompt, twice, for the engine with PolarKV, or for `both`."""
        self._starts += 1
        (prompt,) = islice(fresh_prompts(self._tokenizer, WARM_UP_TOKENS, seed=self._starts), 1)
        say(f"warming up: {WARM_UP_TOKENS} fresh tokens, twice")
        for port in (self._polarkv_port, self._plain_port) if both else (self._polarkv_port,):
            for _ in range(2):
                generate(port, prompt, MAX_NEW_TOKENS)

    def play_without_hit(self) -> None:
        """Fresh prompts for both engines, in turn: what PolarKV costs where nothing hits."""
        say(f"no hit: {NO_HIT_PAIRS} times {NO_HIT_TOKENS} fresh tokens on each engine")
        prompts = islice(fresh_prompts(self._tokenizer, NO_HIT_TOKENS, seed=100), NO_HIT_PAIRS)
        for pair, prompt in enumerate(prompts):
            self.no_hit_ratios.append(self._no_hit_ratio(prompt, polarkv_first=pair % 2 == 0))

    def _no_hit_ratio(self, prompt: list[int], polarkv_first: bool) -> float:
        if polarkv_first:
            polarkv, plain = generate(self._polarkv_port, prompt, 1), generate(self._plain_port, prompt, 1)
        else:
            plain, polarkv = generate(self._plain_port, prompt, 1), generate(self._polarkv_port, prompt, 1)
        if tiers_of(polarkv).computed != len(prompt) or plain.cached_tokens:
            raise DemoFailed(
                f"a fresh prompt was found in a cache: {polarkv.tiers}, plain {plain.cached_tokens}"
            )
        return polarkv.ttft_s / plain.ttft_s

    def play_round(self, phase: Phase, again: bool = False) -> None:
        """The next turn of every session, or the last one `again`.

        Until a session is played once more the others have taken its place in L1 and L2.
        """
        for session in self._sessions:
            turn = self._play_again(session, phase) if again else self._play_next(session, phase)
            self.turns.append(turn)
            say(
                f"{phase} {turn.session} turn {turn.turn}: {turn.prompt_tokens} tokens, {turn.l3} from L3,"
                f" {turn.computed} computed; TTFT {turn.ttft_s:.3f} s, L1 hit {turn.l1_ttft_s:.3f} s,"
                f" plain {turn.plain_ttft_s:.3f} s"
            )

    def _play_next(self, session: Session, phase: Phase) -> Turn:
        turn, reply = self._measure(session, phase, session.ask(), {})
        session.hear(reply.output_ids)
        self._last_replies[session.name] = reply
        return turn

    def _play_again(self, session: Session, phase: Phase) -> Turn:
        expected = {"before the restart": self._last_replies[session.name]}
        return self._measure(session, phase, session.ask_again(), expected)[0]

    def _ask(self, port: int, prompt: list[int], max_new_tokens: int) -> Reply:
        """A timed request to an engine that is awake, as one under load is: a short one comes before it."""
        generate(port, next(self._wake_prompts), 2)
        return generate(port, prompt, max_new_tokens)

    def _measure(
        self, session: Session, phase: Phase, prompt: list[int], expected: dict[str, Reply]
    ) -> tuple[Turn, Reply]:
        """Every reply must equal the first, which is returned, and those `expected`.

        While one engine computes for seconds the caches of the CPU forget the other. So the L1 hit, like the
        prompt that it is compared with, comes after the other engine's turn.
        """
        polarkv = self._ask(self._polarkv_port, prompt, MAX_NEW_TOKENS)
        plain = self._ask(self._plain_port, prompt, MAX_NEW_TOKENS)
        hit = self._ask(self._polarkv_port, prompt, MAX_NEW_TOKENS)

        if tiers_of(hit).l1 < len(prompt) - 2 * PAGE_TOKENS:
            raise DemoFailed(f"{session.name} turn {session.turn} again was no L1 hit: {hit.tiers}")
        replies = {"plain": plain, "L1 hit": hit, **expected}
        different = [name for name, reply in replies.items() if reply.output_ids != polarkv.output_ids]
        self.differences += [
            f"{phase} {session.name} turn {session.turn}:"
            f" PolarKV {polarkv.text!r}, {name} {replies[name].text!r}"
            for name in different
        ]
        tiers = tiers_of(polarkv)
        turn = Turn(
            session=session.name,
            turn=session.turn,
            phase=phase,
            prompt_tokens=len(prompt),
            l1=tiers.l1,
            l2=tiers.l2,
            l3=tiers.l3,
            computed=tiers.computed,
            ttft_s=polarkv.ttft_s,
            l1_ttft_s=hit.ttft_s,
            plain_ttft_s=plain.ttft_s,
            outputs_equal=not different,
        )
        return turn, polarkv


def tiers_of(reply: Reply) -> Tiers:
    """Where the prompt came from; raises DemoFailed if the engine does not say or it does not add up."""
    if reply.tiers is None:
        raise DemoFailed("the engine's answer has no meta_info['polarkv']: PolarKV is not active in it")
    if not reply.tiers.adds_up():
        raise DemoFailed(f"the tiers do not add up to the prompt: {reply.tiers}")
    return reply.tiers
