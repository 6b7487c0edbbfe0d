"""One request to SGLang's native /generate endpoint, timed on the client."""

from __future__ import annotations

import http.client
import time
from typing import Any, NamedTuple

import msgspec

from polarkv_sglang.errors import PolarError


class RequestFailed(PolarError):
    """The server refused a request, broke off its answer, or answered something else."""


class Tiers(msgspec.Struct, frozen=True):
    """Where the tokens of one prompt came from; what the engine reports with --enable-polarkv."""

    prompt: int
    l1: int
    l2: int
    l3: int
    l4: int
    blended: int
    computed: int

    def adds_up(self) -> bool:
        return self.l1 + self.l2 + self.l3 + self.l4 + self.blended + self.computed == self.prompt


class Reply(NamedTuple):
    output_ids: tuple[int, ...]  # greedy, without the prompt
    text: str
    ttft_s: float  # from sending the request to the first token's arrival
    cached_tokens: int  # of the prompt, from any tier
    tiers: Tiers | None  # None from SGLang without PolarKV


class CacheDetails(msgspec.Struct):
    """Prompt tokens by the tier they came from, as any SGLang reports them."""

    device: int = 0
    host: int = 0
    storage: int = 0


class Meta(msgspec.Struct):
    """What is read of an answer's meta_info."""

    cached_tokens: int = 0
    cached_tokens_details: CacheDetails | None = None
    polarkv: Tiers | None = None


class Chunk(msgspec.Struct):
    """One event of a streamed answer; text and ids are all that were generated so far."""

    text: str = ""
    output_ids: list[int] = []
    meta_info: Meta = msgspec.field(default_factory=Meta)
    error: Any = None


def generate(port: int, prompt_ids: list[int], max_new_tokens: int, timeout_s: float = 180.0) -> Reply:
    """Continue `prompt_ids` greedily by at most `max_new_tokens` tokens.

    Raises RequestFailed, also when no byte comes for `timeout_s`.
    """
    request = {
        "input_ids": prompt_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens},
        "stream": True,
    }
    body = msgspec.json.encode(request)
    decode = msgspec.json.Decoder(Chunk).decode
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    last, ttft_s = Chunk(), 0.0
    try:
        connection.connect()
        started = time.perf_counter()
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RequestFailed(f"port {port} answered HTTP {response.status}: {response.read(500)!r}")
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if not data or data == b"[DONE]":
                continue
            last = decode(data)
            if last.error is not None:
                raise RequestFailed(f"port {port} answered an error: {last.error}")
            if not ttft_s and last.output_ids:
                ttft_s = time.perf_counter() - started
    except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise RequestFailed(f"request to port {port} failed: {error!r}") from error
    finally:
        connection.close()
    if not last.output_ids:
        raise RequestFailed(f"port {port} answered no token")
    meta = last.meta_info
    return Reply(tuple(last.output_ids), last.text, ttft_s, meta.cached_tokens, meta.polarkv)
