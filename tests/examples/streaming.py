"""A server that streams answers as SGLang does, for tests of what talks to one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Event = dict[str, object]


@dataclass
class Streaming:
    """What the server was asked, in the order in which it came."""

    url: str = ""
    prompts: list[list[int]] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)
    flushes: int = 0


def tokens(*ids: int, **meta: object) -> Event:
    return {"text": "x" * len(ids), "output_ids": list(ids), "meta_info": meta}


@contextmanager
def streaming(
    answer: Callable[[list[int]], list[Event] | int], *, delay_s: float = 0.0
) -> Iterator[Streaming]:
    """Serve ``answer(prompt)``: events, ``delay_s`` before each, or an HTTP status. Requests overlap."""
    seen = Streaming()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            if self.path == "/flush_cache":
                with lock:
                    seen.flushes += 1
                self._status(200)
                return
            prompt = body["input_ids"]
            with lock:
                seen.bodies.append(body)
                seen.prompts.append(prompt)
                seen.arrived_s.append(time.perf_counter())
            events = answer(prompt)
            if isinstance(events, int):
                self._status(events)
                return
            self._status(200)
            for event in events:
                time.sleep(delay_s)
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def _status(self, status: int) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        seen.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield seen
        finally:
            listening.shutdown()
            thread.join()
