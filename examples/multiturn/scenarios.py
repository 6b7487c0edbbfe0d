"""The three published scenarios, each at full size and for a laptop.

What the publication does not say is our choice, and marked so.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Final

from examples import smollm2
from examples.multiturn.presets import (
    Conversations,
    Goal,
    Preset,
    Scenario,
    TierSizes,
    from_gigabytes,
    scaled,
)

# Single precision on a CPU: half precision decides near ties by a batch's shape, in plain SGLang too, and
# equal outputs are demanded.
_FLOAT32: Final = ("--dtype", "float32")
_FLOAT_BYTES: Final = 4
_TINY_VOCABULARY: Final = 512  # of a tiny model
_LAPTOP_S: Final = 560.0  # of the ten minutes that a laptop run may take; the rest is not reckoned


def _token_bytes(layers: int, kv_heads: int, head_dim: int, value_bytes: int) -> int:
    return 2 * layers * kv_heads * head_dim * value_bytes


def _tiny(arch: str, sizes: dict[str, int], path: Path) -> Path:
    """Build a tiny model; it is there whole or not at all."""
    import torch

    from examples.common import tiny_models  # seconds, which only the first run spends

    unfinished = path.with_name(f".{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    return tiny_models.build(arch, unfinished, dtype=torch.float32, sizes=sizes).rename(path)


def _tiny_path(arch: str, sizes: dict[str, int]) -> str:
    """Other sizes are another folder: a model of an older preset is not taken for this one."""
    return f"models/{arch}-{'-'.join(map(str, sizes.values()))}"


# GLM-4.5. Page size, lengths of questions and answers and the number of sessions are our choice: as many as
# fill the pool.
_GLM_PAGE: Final = 64
_GLM_TIERS: Final = from_gigabytes(44, 256, 450, _token_bytes(92, 8, 128, 2), _GLM_PAGE)
_GLM_PUBLISHED: Final = Preset(
    name="published",
    model="zai-org/GLM-4.5-FP8",
    conversations=Conversations(
        sessions=105, rounds=10, history_tokens=10_000, question_tokens=64, answer_tokens=64
    ),
    tiers=_GLM_TIERS,
    page_tokens=_GLM_PAGE,
    qps=4.0,
    load=0.0,
    published_qps=4.0,
    tp=8,
    repeats=3,
    at_once=False,
    start_timeout_s=3600.0,
)
# As many pages a history as published, of 16 tokens each, and a ninth of the sessions.
_GLM_LAPTOP_PAGE: Final = 16
_GLM_LAPTOP_TALK: Final = Conversations(
    sessions=12,
    rounds=10,
    history_tokens=-(-10_000 // _GLM_PAGE) * _GLM_LAPTOP_PAGE,
    question_tokens=_GLM_LAPTOP_PAGE,
    answer_tokens=_GLM_LAPTOP_PAGE // 2,
    vocabulary=_TINY_VOCABULARY,
)
_GLM_LAPTOP_SIZES: Final = {"hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 1024}
GLM45: Final = Scenario(
    name="glm45_multiturn",
    title="GLM-4.5: published with 10 rounds over a history of 10K tokens (157 pages)",
    published=_GLM_PUBLISHED,
    laptop=Preset(
        name="laptop",
        model=_tiny_path("glm4_moe", _GLM_LAPTOP_SIZES),
        prepare=partial(_tiny, "glm4_moe", _GLM_LAPTOP_SIZES),
        conversations=_GLM_LAPTOP_TALK,
        tiers=scaled(
            _GLM_TIERS,
            _GLM_LAPTOP_TALK.working_set_tokens / _GLM_PUBLISHED.conversations.working_set_tokens,
            _token_bytes(_GLM_LAPTOP_SIZES["num_hidden_layers"], 2, 32, _FLOAT_BYTES),
            _GLM_LAPTOP_PAGE,
        ),
        page_tokens=_GLM_LAPTOP_PAGE,
        load=1.0,
        published_qps=4.0,
        repeats=2,
        limit_s=_LAPTOP_S,
        at_once=True,
        engine_flags=_FLOAT32,
    ),
    published_result="TTFT 2.1x lower",
    goal=Goal(ttft_ratio=2.1),
)

# DeepSeek-R1-Distill-Qwen-32B int8 on a 4090 of 48 GB: the sizes of the tiers, the rate and the number of
# sessions are our choice. About 10 GB are left for KV beside 33 GB of weights.
_CHAT_PAGE: Final = 64
CHATBOT: Final = Scenario(
    name="chatbot_multiturn",
    title="Chatbot: published with 10 rounds over a history of 3,000 tokens",
    published=Preset(
        name="published",
        model="RedHatAI/DeepSeek-R1-Distill-Qwen-32B-quantized.w8a8",
        conversations=Conversations(
            sessions=60,
            rounds=10,
            history_tokens=3000,
            question_tokens=64,
            answer_tokens=64,
            think_s=1.0,
        ),
        tiers=from_gigabytes(10, 20, 80, _token_bytes(64, 8, 128, 2), _CHAT_PAGE),
        page_tokens=_CHAT_PAGE,
        qps=2.0,
        load=0.0,
        repeats=3,
        at_once=False,
        start_timeout_s=1800.0,
    ),
    laptop=Preset(
        name="laptop",
        model=str(smollm2.DEFAULT_TARGET),
        prepare=smollm2.prepare,
        # L1 holds one conversation and L2 two; three, in turn, outgrow both. Histories are as long as leaves
        # time for a second round where a fresh one takes 10 s and a server 50 s to start.
        conversations=Conversations(
            sessions=3,
            rounds=10,
            history_tokens=2560,
            question_tokens=24,
            answer_tokens=4,
            real_text=True,
            think_s=0.5,
        ),
        tiers=TierSizes(
            l1_tokens=3072,
            l2_tokens=2 * 3072,
            l3_tokens=4 * 3072,
            token_bytes=_token_bytes(30, 3, 64, _FLOAT_BYTES),
        ),
        page_tokens=16,
        load=5.0,
        repeats=1,
        limit_s=_LAPTOP_S,
        min_rounds=2,
        at_once=False,
        # Each server gets a request of ours before it is measured.
        engine_flags=(*_FLOAT32, "--skip-server-warmup"),
        ignore_eos=False,
    ),
    published_result="TTFT 26.8x lower, tokens/s +62 %",
    goal=Goal(throughput_gain=0.62, restored_to_l1=1.15),
)

# Qwen3-Coder-480B-A35B FP8 on 8 x H20: the sizes of the tiers, the rate and the number of sessions are our
# choice.
_CODER_PAGE: Final = 64
# The longest history, in whole chunks of a prefill, that the baseline computes often enough in a few minutes;
# as many of the published rounds.
_CODER_LAPTOP_TALK: Final = Conversations(
    sessions=3,
    rounds=6,
    history_tokens=16_384,
    question_tokens=32,
    answer_tokens=8,
    vocabulary=_TINY_VOCABULARY,
    think_s=0.5,
)
_CODER_LAPTOP_SIZES: Final = {"num_hidden_layers": 2, "max_position_embeddings": 32_768}
CODER: Final = Scenario(
    name="coder_long_context",
    title="Coder: published with 10 rounds over a history of 200K tokens",
    published=Preset(
        name="published",
        model="Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8",
        conversations=Conversations(
            sessions=10,
            rounds=10,
            history_tokens=200_000,
            question_tokens=256,
            answer_tokens=128,
            think_s=1.0,
        ),
        tiers=from_gigabytes(110, 220, 600, _token_bytes(62, 8, 128, 2), _CODER_PAGE),
        page_tokens=_CODER_PAGE,
        qps=0.2,
        load=0.0,
        tp=8,
        repeats=3,
        at_once=False,
        engine_flags=("--context-length", "262144"),
        start_timeout_s=3600.0,
    ),
    laptop=Preset(
        name="laptop",
        model=_tiny_path("qwen3_moe", _CODER_LAPTOP_SIZES),
        prepare=partial(_tiny, "qwen3_moe", _CODER_LAPTOP_SIZES),
        conversations=_CODER_LAPTOP_TALK,
        # L1 holds one session, L2 two and L3 all.
        tiers=TierSizes(
            l1_tokens=20_480,
            l2_tokens=2 * 20_480,
            l3_tokens=4 * 20_480,
            token_bytes=_token_bytes(_CODER_LAPTOP_SIZES["num_hidden_layers"], 2, 32, _FLOAT_BYTES),
        ),
        page_tokens=_CODER_PAGE,
        load=5.0,
        repeats=2,
        limit_s=_LAPTOP_S,
        at_once=True,
        engine_flags=(*_FLOAT32, "--chunked-prefill-size", "2048"),
    ),
    published_result="TTFT 8.6x lower",
)
