"""The load generator: sessions that stream from one server over HTTP, as an open loop.

Turns are sent when they are due, whatever became of others. Only a session's own last answer must be there
before it asks on: a turn that is due earlier waits for it, and how long is reported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
import msgspec

from examples.common.client import CacheDetails, Chunk, Meta, RequestFailed
from examples.multiturn.sessions import Speaker, Turn

_READ_BUFFER_BYTES = 1 << 20


class Streamed(NamedTuple):
    """One answer as it came."""

    prompt_tokens: int
    output_ids: tuple[int, ...]
    ttft_s: float  # from sending to the first token's arrival
    token_gaps_s: tuple[float, ...]  # of every later token; tokens that came together share their gap
    hits: CacheDetails


class Answer(NamedTuple):
    """What became of one turn."""

    session: int
    round: int
    sent_s: float  # after the begin of the play
    ended_s: float
    late_s: float  # how much later than due it was sent, for want of the session's last answer
    streamed: Streamed | None  # None: it failed
    error: str = ""


class Client:
    """Requests to one server. Use as ``async with Client(url) as client``."""

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=None, sock_read=timeout_s)

    async def __aenter__(self) -> Client:
        self._http = aiohttp.ClientSession(
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=_READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.close()

    async def generate(self, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = False) -> Streamed:
        """Continue ``prompt`` greedily. Raises RequestFailed, also when no byte comes for the timeout."""
        request = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": ignore_eos,
            },
            "stream": True,
        }
        body = msgspec.json.encode(request)
        sent = time.perf_counter()
        try:
            async with self._http.post(
                f"{self.url}/generate", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    raise RequestFailed(
                        f"{self.url} answered HTTP {response.status}: {await response.text()}"
                    )
                return await _collect(response, len(prompt), sent)
        except (aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError) as error:
            # TimeoutError is an OSError; ValueError is a line that outgrows the buffer.
            raise RequestFailed(f"request to {self.url} failed: {error!r}") from error

    async def flush_cache(self) -> None:
        """Lose L1 and L2; refused by the server while a request or a write is under way: then tried again."""
        for _ in range(100):
            async with self._http.post(f"{self.url}/flush_cache") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.1)
        raise RequestFailed(f"{self.url} does not flush its cache")


async def _collect(response: aiohttp.ClientResponse, prompt_tokens: int, sent: float) -> Streamed:
    decode = msgspec.json.Decoder(Chunk).decode
    last, ttft_s, previous = Chunk(), 0.0, sent
    gaps: list[float] = []
    async for line in response.content:
        now = time.perf_counter()
        data = line.strip().removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        chunk = decode(data)
        if chunk.error is not None:
            raise RequestFailed(f"{response.url} answered an error: {chunk.error}")
        more = len(chunk.output_ids) - len(last.output_ids)
        if more > 0:
            if not last.output_ids:
                ttft_s = now - sent
                gaps += [0.0] * (more - 1)
            else:
                gaps += [(now - previous) / more] * more
            previous = now
        last = chunk
    if not last.output_ids:
        raise RequestFailed(f"{response.url} answered no token")
    return Streamed(prompt_tokens, tuple(last.output_ids), ttft_s, tuple(gaps), _hits(last.meta_info))


def _hits(meta: Meta) -> CacheDetails:
    """By PolarKV's account where there is one: SGLang calls what a cache linker loaded a host hit."""
    if meta.polarkv is not None:
        return CacheDetails(device=meta.polarkv.l1, host=meta.polarkv.l2, storage=meta.polarkv.l3)
    return meta.cached_tokens_details or CacheDetails(device=meta.cached_tokens)


def import_generator() -> None:
    """Import now what ``play`` uses of SGLang, which takes seconds."""
    from sglang.benchmark.serving import get_request  # noqa: F401


async def play(
    client: Client,
    sessions: Sequence[Speaker],
    turns: Sequence[Turn],
    max_new_tokens: int,
    *,
    think_s: float = 0.0,
    ignore_eos: bool = False,
) -> list[Answer]:
    """Send every turn; returns when all have been answered or have failed, in the order they were due."""
    from sglang.benchmark.serving import get_request

    started = time.perf_counter()
    heard: dict[int, asyncio.Task[Answer]] = {}

    async def take(turn: Turn, before: asyncio.Task[Answer] | None) -> Answer:
        if before is not None:
            last = await before
            await asyncio.sleep(started + last.ended_s + think_s - time.perf_counter())
        sent_s = time.perf_counter() - started
        speaker, streamed, error = sessions[turn.session], None, ""
        try:
            streamed = await client.generate(speaker.ask(), max_new_tokens, ignore_eos=ignore_eos)
            speaker.hear(streamed.output_ids)
        except RequestFailed as failure:
            error = str(failure)
        ended_s = time.perf_counter() - started
        late_s = max(0.0, sent_s - turn.timestamp / 1000.0)
        return Answer(turn.session, turn.round, sent_s, ended_s, late_s, streamed, error)

    tasks: list[asyncio.Task[Answer]] = []
    arrivals = get_request(list(turns), float("inf"), use_trace_timestamps=True)
    async for turn in arrivals:
        task = asyncio.create_task(take(turn, heard.get(turn.session)))
        heard[turn.session] = task
        tasks.append(task)
    return list(await asyncio.gather(*tasks))
