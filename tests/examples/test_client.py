from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from examples.common.client import RequestFailed, Tiers, generate

TIERS = {"prompt": 3, "l1": 1, "l2": 0, "l3": 1, "l4": 0, "blended": 0, "computed": 1}


@contextmanager
def server(chunks: list[dict[str, object]], status: int = 200, delay_s: float = 0.0) -> Iterator[int]:
    """Answers every POST with `chunks` as SGLang streams them, waiting after each; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                self.wfile.flush()
                time.sleep(delay_s)
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()
            thread.join()


def chunk(output_ids: list[int], **meta: object) -> dict[str, object]:
    return {"text": "x" * len(output_ids), "output_ids": output_ids, "meta_info": {"id": "1", **meta}}


def test_the_last_chunk_is_the_reply_and_the_first_token_stops_the_clock():
    chunks = [chunk([]), chunk([7]), chunk([7, 8], cached_tokens=2, polarkv=TIERS)]
    delay_s = 0.4
    with server(chunks, delay_s=delay_s) as port:
        started = time.perf_counter()
        reply = generate(port, [1, 2, 3], 2)
        total_s = time.perf_counter() - started
    assert reply.output_ids == (7, 8)
    assert reply.cached_tokens == 2
    assert reply.tiers == Tiers(**TIERS)
    assert (
        delay_s <= reply.ttft_s <= total_s - delay_s
    )  # two pauses come after it: one may be lost on a busy machine


def test_plain_sglang_has_no_tiers():
    with server([chunk([7], cached_tokens=0)]) as port:
        assert generate(port, [1], 1).tiers is None


@pytest.mark.parametrize(
    ("chunks", "status"),
    [([{"error": {"message": "too long"}}], 200), ([], 200), ([chunk([7])], 503)],
    ids=["error chunk", "no token", "HTTP 503"],
)
def test_a_failed_request_is_one_kind_of_error(chunks, status):
    with server(chunks, status) as port, pytest.raises(RequestFailed, match=str(port)):
        generate(port, [1], 1)


def test_an_absent_server_is_the_same_kind_of_error():
    with server([]) as port:
        pass
    with pytest.raises(RequestFailed, match=str(port)):
        generate(port, [1], 1)


@pytest.mark.parametrize("missing", ["l1", "l3", "computed"])
def test_tiers_that_lose_tokens_do_not_add_up(missing):
    assert Tiers(**TIERS).adds_up()
    assert not Tiers(**(TIERS | {missing: 0})).adds_up()
