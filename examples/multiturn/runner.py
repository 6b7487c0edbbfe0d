"""Runs a scenario: starts the systems, plays the same turns on each in turn, and ends them again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
from tokenizers import Tokenizer

from examples.common.processes import Process, say
from examples.multiturn.duration import WARM_UP, fitting_rounds
from examples.multiturn.figures import Played
from examples.multiturn.load import Client, import_generator, play
from examples.multiturn.presets import Preset, Scenario
from examples.multiturn.probe import Restore, restore
from examples.multiturn.sessions import Speaker, schedule, speakers
from examples.multiturn.systems import Setting, System
from polarkv_sglang.errors import PolarError

CALIBRATIONS = 5
ENOUGH_S = 4.0  # of calibrating
PROBES = 3


class BenchmarkFailed(PolarError):
    """A benchmark could not be run to its end."""


class Rate(NamedTuple):
    """Requests a second that are offered, and what they were derived from."""

    qps: float
    request_s: float | None  # seconds of one whole request with a fresh history; None: the rate was given


class Results(NamedTuple):
    """What a run measured, by system."""

    preset: Preset  # as played
    rate: Rate
    plays: dict[str, list[Played]]
    restores: dict[str, Restore]


class Runner:
    """One run of one scenario. ``urls`` names servers that run already; all others are started here.

    Raises ConfigError, when made, for conversations that need a tokenizer which the model lacks.
    """

    def __init__(
        self,
        scenario: Scenario,
        preset: Preset,
        systems: Sequence[System],
        setting: Setting,
        *,
        repeats: int,
        seed: int,
        urls: Mapping[str, str],
    ) -> None:
        self._scenario = scenario
        self._preset = preset
        self._systems = systems
        self._setting = setting
        self._repeats = repeats
        self._seed = seed
        self._urls = urls
        self._tokenizer = _tokenizer(setting.model)
        self._rate = None if preset.qps is None else Rate(preset.qps, None)  # None: not measured yet
        self._begun = time.monotonic()
        self._start_s = 0.0  # of the servers that were started last
        self._plays: dict[str, list[Played]] = {system.name: [] for system in systems}
        self._last_sessions: dict[str, Sequence[Speaker]] = {}
        self._restores: dict[str, Restore] = {}
        self._speakers("check", 1)  # what cannot speak is better found before servers start

    def run(self) -> Results:
        """Raises PolarError; everything that was started has ended then, and when this returns."""
        if self._preset.at_once or all(system.name in self._urls for system in self._systems):
            with self._serving(self._systems) as urls:
                for system in self._systems:
                    asyncio.run(self._warm_up(system, urls[system.name]))
                first_at = time.monotonic()
                for repeat in range(self._repeats):
                    if repeat and self._outlasts((time.monotonic() - first_at) / repeat):
                        say(f"{repeat} of {self._repeats} repeats fit in the time; --repeats plays more")
                        break
                    for system in _rotated(self._systems, repeat):
                        asyncio.run(self._play(system, urls[system.name], repeat))
                for system in self._systems:
                    asyncio.run(self._probe(system, urls[system.name]))
        else:
            for repeat in range(self._repeats):
                for system in _rotated(self._systems, repeat):
                    with self._serving([system]) as urls:
                        asyncio.run(self._warm_up(system, urls[system.name]))
                        asyncio.run(self._play(system, urls[system.name], repeat))
                        if repeat == self._repeats - 1:
                            asyncio.run(self._probe(system, urls[system.name]))
        assert self._rate is not None
        return Results(self._preset, self._rate, self._plays, self._restores)

    def _outlasts(self, repeat_s: float) -> bool:
        """Whether another repeat, of so many seconds, would end after the preset's limit."""
        limit_s = self._preset.limit_s
        return limit_s is not None and time.monotonic() - self._begun + repeat_s > limit_s

    def _fit_rounds(self, request_s: float) -> None:
        """Play fewer rounds from here on if the preset's would outlast its limit."""
        talk, fewest = self._preset.conversations, self._preset.min_rounds
        if fewest is None:
            return
        fitting = fitting_rounds(
            self._preset,
            self._systems,
            spent_s=time.monotonic() - self._begun,
            start_s=self._start_s,
            request_s=request_s,
        )
        if fitting >= talk.rounds:
            return
        if fitting >= fewest:
            say(f"{fitting} of {talk.rounds} rounds fit in the time; --rounds plays more")
        else:
            say(f"{fewest} of {talk.rounds} rounds, the fewest: this may take longer than it should")
        talk = msgspec.structs.replace(talk, rounds=max(fitting, fewest))
        self._preset = msgspec.structs.replace(self._preset, conversations=talk)

    @contextmanager
    def _serving(self, systems: Sequence[System]) -> Iterator[dict[str, str]]:
        """The systems' URLs, once all are ready."""
        urls = {system.name: self._urls[system.name] for system in systems if system.name in self._urls}
        plans = {
            system.name: system.plan(self._setting) for system in systems if system.name not in self._urls
        }
        with ExitStack() as stack:
            importing = stack.enter_context(ThreadPoolExecutor(1)).submit(import_generator)
            helpers = [process for plan in plans.values() for process in plan.helpers]
            engines = [plan.engine for plan in plans.values()]
            began = time.monotonic()
            # An engine takes some seconds to stop, and has nothing to leave behind.
            for processes, end in ((helpers, Process.stop), (engines, Process.kill)):
                stack.callback(_end, processes, end)
                _start(processes)
            self._start_s = time.monotonic() - began
            importing.result()
            yield urls | {name: plan.url for name, plan in plans.items()}

    async def _warm_up(self, system: System, url: str) -> None:
        """Part of a fresh history; on the first system whole ones too, which set the rate."""
        answer_tokens = self._preset.conversations.answer_tokens
        first, *whole = (speaker.ask() for speaker in self._speakers("warm-up", 1 + CALIBRATIONS))
        async with Client(url) as client:
            await client.generate(first[: int(len(first) * WARM_UP)], 2, ignore_eos=True)
            if self._rate is None:
                seconds: list[float] = []
                while len(seconds) < CALIBRATIONS and sum(seconds) < ENOUGH_S:
                    answer = await client.generate(whole[len(seconds)], answer_tokens)
                    seconds.append(answer.ttft_s + sum(answer.token_gaps_s))
                request_s = median(seconds)
                say(
                    f"{system.label}: a fresh history of {len(first)} tokens and {answer_tokens} more"
                    f" take {request_s:.3f} s"
                )
                self._rate = Rate(self._preset.load / request_s, request_s)
                say(describe_rate(self._rate, self._preset))
                self._fit_rounds(request_s)

    async def _play(self, system: System, url: str, repeat: int) -> None:
        assert self._rate is not None
        talk, preset = self._preset.conversations, self._preset
        sessions = self._speakers(f"repeat-{repeat}", talk.sessions)
        turns = schedule(talk, self._rate.qps, self._seed + repeat)
        async with Client(url) as client:
            answers = await play(
                client,
                sessions,
                turns,
                talk.answer_tokens,
                think_s=talk.think_s,
                ignore_eos=preset.ignore_eos,
            )
            played = Played(answers)
            self._plays[system.name].append(played)
            failed = len(answers) - len(played.streamed)
            say(
                f"repeat {repeat + 1} of {self._repeats}, {system.label}:"
                f" mean TTFT {played.ttft_mean_s:.3f} s,"
                f" {played.output_tokens_per_s:.1f} tokens/s, {failed} of {len(answers)} failed"
            )
            if not played.streamed:
                raise BenchmarkFailed(
                    f"every request to {system.label} failed; the first: {answers[0].error}"
                )
            if played.first_round_hits:
                raise BenchmarkFailed(
                    f"{system.label} had {played.first_round_hits} tokens of fresh conversations in its"
                    f" caches, left there by another run; give another --seed than {self._seed}"
                )
            self._last_sessions[system.name] = sessions

    async def _probe(self, system: System, url: str) -> None:
        """After the last repeat: what its last prompts cost alone. Not on a server that others may use."""
        if not system.has_l3 or system.name in self._urls:
            return
        prompts = [speaker.ask_again() for speaker in self._last_sessions[system.name][-PROBES:]]
        async with Client(url) as client:
            measured = await restore(client, prompts)
        self._restores[system.name] = measured
        say(
            f"{system.label}: restored from L3 {measured.restored_ttft_s:.3f} s, L1 hit"
            f" {measured.l1_ttft_s:.3f} s,"
            f" {measured.missed} of {measured.prompts + measured.missed} not restored"
        )

    def _speakers(self, label: str, sessions: int) -> list[Speaker]:
        return speakers(self._preset.conversations, self._tokenizer, f"{self._seed}.{label}", sessions)


def describe_rate(rate: Rate, preset: Preset) -> str:
    """How the offered rate relates to the published one, and to what the machine can compute."""
    scale = ""
    if preset.published_qps is not None:
        scale = f", {rate.qps / preset.published_qps:.3f} of the published {preset.published_qps:g}"
    if rate.request_s is None:
        return f"arrivals: {rate.qps:g} requests/s{scale}"
    return (
        f"arrivals: {rate.qps:.3f} requests/s, {preset.load:g} times what is answered here without a cache "
        f"(one request in {rate.request_s:.3f} s){scale}"
    )


def _rotated(systems: Sequence[System], repeat: int) -> list[System]:
    """Each system comes first, second and so on as often as any other, given enough repeats."""
    turn = repeat % len(systems)
    return [*systems[turn:], *systems[:turn]]


def _start(processes: Sequence[Process]) -> None:
    for process in processes:
        say(f"starting {process.name}:\n\n    {process.command_line()}\n")
        process.start()
    for process in processes:
        process.wait_until_ready()
    if processes:
        say(f"ready: {', '.join(process.name for process in processes)}")


def _end(processes: Sequence[Process], end: Callable[[Process], None]) -> None:
    """All at once: each may take seconds to end."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(end, processes))


def _tokenizer(model: str) -> Tokenizer | None:
    file = Path(model) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None
