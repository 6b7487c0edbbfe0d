"""PolarKV in sglang.Engine, without a server: a prompt is computed, hit in L1, and restored from the pool."""

import argparse

import sglang

from examples.smollm2 import prepare
from polarkv_sglang.plugin import server_args

GREEDY = {"temperature": 0, "max_new_tokens": 16}
PROMPT = "The keeper of the lighthouse wrote down every ship that passed, its colours and its course. " * 50


def main() -> None:
    argparse.ArgumentParser(prog="python -m examples.offline_engine", description=__doc__).parse_args()
    settings = {"model_path": str(prepare()), "page_size": 16, "max_total_tokens": 4096}
    arguments = server_args(**settings, polarkv={"capacity": 1 << 30})  # with a memory node beside it
    engine = sglang.Engine(server_args=arguments)
    try:
        for how in ("computed", "L1 hit", "restored from L3"):
            if how == "restored from L3":
                engine.flush_cache()  # L1 and L2 are empty now
            answer = engine.generate(PROMPT, GREEDY)
            print(f"{how}: {answer['meta_info']['polarkv']}\n    {answer['text']!r}", flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
