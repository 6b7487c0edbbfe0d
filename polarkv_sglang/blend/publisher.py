"""Tells the pool which text this engine's blocks there are of, in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from polarkv_sglang.blend.rolling import RollingHash, Tokens
from polarkv_sglang.blend.sightings import Naming, Written, sightings
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport.messages import MAX_NOTES

logger = logging.getLogger(__name__)

# Notes that are remembered here: they are written once their last block is in the pool, and again whenever
# it is put there again.
_MOST_NOTES: Final = 16384
# What waits for the thread at most; more is forgotten.
_MOST_EVENTS: Final = 1024
_MOST_TOKENS: Final = 1 << 22

# SGLang's chained page hashes of tokens: of the whole pages, from a seed on.
PageHashes = Callable[[Tokens, str], list[str]]


class _Learned(NamedTuple):
    naming: Naming
    tokens: Tokens


class _Stored(NamedTuple):
    pages: Sequence[str]


class Publisher:
    """Writes notes of prompts whose exact KV was computed here and has reached the pool.

    The scheduler's thread calls ``learn`` and ``forget``, the one that writes blocks ``stored``; none waits.
    What does not get through is not found by others, and computed by them.

    Memory is bounded: 16,384 notes of up to 4 KiB each are remembered, 64 MiB and about 8 for their names.
    Of 1,024 events that can wait, a prompt's keeps its tokens, 8 bytes each: 32 MiB of all.
    """

    def __init__(
        self, client: PoolClient, hash_pages: PageHashes, *, page_tokens: int, stripe_pages: int
    ) -> None:
        self._client = client
        self._hash_pages = hash_pages
        self._page_tokens = page_tokens
        self._stripe_pages = stripe_pages
        self._notes: OrderedDict[bytes, Written] = OrderedDict()  # by key, the last one learned counts
        self._keys: dict[str, set[bytes]] = {}  # of these notes, by the last page
        self._rolling: RollingHash | None = None
        self._events: queue.Queue[_Learned | _Stored | None] = queue.Queue(_MOST_EVENTS)
        self._waiting_tokens = 0  # in them
        self._lock = threading.Lock()  # of _waiting_tokens
        self._thread = threading.Thread(target=self._run, name="polarkv-blend-publisher", daemon=True)
        self._thread.start()

    def learn(self, naming: Naming, tokens: Tokens) -> None:
        """A prompt's exact KV is in the radix tree, from where its pages go to the pool."""
        if self._waits_with(len(tokens)) and not self._tell(_Learned(naming, tokens)):
            self._waits_with(-len(tokens))

    def stored(self, pages: Sequence[str]) -> None:
        """Blocks with these page hashes are in the pool."""
        self._tell(_Stored(pages))

    def close(self) -> None:
        """End the thread, once it has done what it was told."""
        self._events.put(None)
        self._thread.join()

    def _waits_with(self, tokens: int) -> bool:
        """Whether so many tokens more, or fewer, may wait; they are counted then."""
        with self._lock:
            fits = self._waiting_tokens + tokens <= _MOST_TOKENS
            self._waiting_tokens += tokens if fits else 0
            return fits

    def _tell(self, event: _Learned | _Stored) -> bool:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                if isinstance(event, _Learned):
                    self._waits_with(-len(event.tokens))
                    self._learn(event)
                else:
                    self._write(event.pages)
            except Exception:  # the pool can never hurt the engine
                logger.exception("PolarKV: text in the pool could not be told of; it is found here only")

    def _learn(self, event: _Learned) -> None:
        naming, tokens = event
        if self._rolling is None or self._rolling.window != naming.window:
            self._rolling = RollingHash(naming.window)
        pages = self._hash_pages(tokens, naming.seed)
        for written in sightings(naming, self._rolling, tokens, pages, self._page_tokens, self._stripe_pages):
            self._forget(written.key)
            self._notes[written.key] = written
            self._keys.setdefault(written.last_page, set()).add(written.key)
        while len(self._notes) > _MOST_NOTES:
            self._forget(next(iter(self._notes)))

    def _forget(self, key: bytes) -> None:
        old = self._notes.pop(key, None)
        if old is not None:
            keys = self._keys[old.last_page]
            keys.discard(key)
            if not keys:
                del self._keys[old.last_page]

    def _write(self, pages: Sequence[str]) -> None:
        keys = [key for page in pages for key in self._keys.get(page, ())]
        for start in range(0, len(keys), MAX_NOTES):
            some = keys[start : start + MAX_NOTES]
            self._client.write_notes({key: self._notes[key].note for key in some})
