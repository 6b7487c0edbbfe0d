"""A script that uses sglang.Engine with PolarKV, as test_engine.py runs it.

    python -m tests.engine.script MODEL NODE

It answers each line of its input, a prompt's token ids as JSON, with a line that starts with ANSWER.
"""

from __future__ import annotations

import json
import sys
from typing import Final

import sglang

from polarkv_sglang.plugin import server_args

ANSWER: Final = "ANSWER "


def main(model: str, node: str) -> None:
    arguments = server_args(
        polarkv={"nodes": [node]},
        model_path=model,
        page_size=16,
        max_total_tokens=4096,
        hicache_ratio=2.0,
        dtype="float32",
        log_level="error",
    )
    engine = sglang.Engine(server_args=arguments)
    greedy = {"temperature": 0, "max_new_tokens": 12}
    for line in sys.stdin:
        reply = engine.generate(input_ids=json.loads(line), sampling_params=greedy)
        answer = {"output_ids": reply["output_ids"], "sources": reply["meta_info"]["polarkv"]}
        print(ANSWER + json.dumps(answer), flush=True)
    engine.shutdown()


if __name__ == "__main__":  # the engine's processes import this module
    main(*sys.argv[1:])
