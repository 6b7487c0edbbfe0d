"""Time to first token over HTTP of prompts whose documents were seen in another order: blended against full.

Each prompt is asked blended first and in full then: a blended one leaves nothing that the full one could use.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from pydoc_data.topics import topics

from transformers import AutoTokenizer

DOCUMENTS = 8


def ask(port: int, tokens: list[int], **custom: object) -> tuple[float, dict[str, int]]:
    """Seconds to the first token, and where the prompt's tokens came from."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1, "custom_params": custom or None},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    reply = json.loads(connection.getresponse().read())
    seconds = time.perf_counter() - started
    connection.close()
    return seconds, reply["meta_info"]["polarkv"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="of an engine with --polarkv-blend")
    parser.add_argument("--model", required=True, help="folder of its tokenizer")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.15)
    args = parser.parse_args()
    encode = AutoTokenizer.from_pretrained(args.model).encode
    head, question = encode("Answer from these chapters.\n\n"), encode("\n\nWhat is compared here? Answer:")
    length = (args.tokens - len(head) - len(question)) // DOCUMENTS
    chapters = [ids for name in sorted(topics) if len(ids := encode(topics[name])) >= length]
    draw = random.Random(0)
    documents = [ids[:length] for ids in draw.sample(chapters, DOCUMENTS)]
    ask(args.port, [*head, *(token for document in documents for token in document)])
    pairs, speedups = [], []
    for _ in range(args.orders):
        order = documents[:]
        while any(one is other for one, other in zip(order, documents)):
            draw.shuffle(order)
        asked = [*head, *(token for document in order for token in document), *question]
        blended_s, sources = ask(args.port, asked, polarkv_blend=True, polarkv_blend_ratio=args.ratio)
        full_s, whole = ask(args.port, asked)
        assert not whole["blended"], "the full prompt was not computed in full"
        pairs.append({"blended_s": blended_s, "full_s": full_s, "sources": sources})
        speedups.append(full_s / blended_s)
    print(json.dumps({"speedup": statistics.median(speedups), "speedups": speedups, "pairs": pairs}))


if __name__ == "__main__":
    main()
