"""Tiny random-weight checkpoints that SGLang loads like real ones.

Each has the features of its family that matter to a KV cache (GQA, qk-norm, partial rotary, a dense layer
before MoE layers, latent KV), can be split by TP=2, and comes with a byte-level BPE tokenizer. The weights
are scaled so that activations stay near one: greedy outputs depend on the whole prompt.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE: Final = 512
MAX_TOKENS: Final = 8192

_CORPUS: Final = (
    "The keeper of the lighthouse wrote down every ship that passed, its colours and its course.",
    "A page that nobody reads again is cheap to lose; one that everybody reads is worth a shelf of its own.",
    "Prefixes are shared, suffixes are private, and the tail always goes before the head.",
)
_CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# What differs from a small Llama. Every number may be replaced by ``sizes`` of build.
_COMMON: Final = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_TOKENS,
    "tie_word_embeddings": False,
}
_EXPERTS: Final = {"moe_intermediate_size": 64, "num_experts_per_tok": 2, "norm_topk_prob": True}


def _llama(sizes: dict[str, int]) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_COMMON | sizes))


def _qwen3(sizes: dict[str, int]) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON | sizes))


def _qwen3_moe(sizes: dict[str, int]) -> PreTrainedModel:
    experts = _EXPERTS | {"num_experts": 8, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON | experts | sizes))


def _glm4_moe(sizes: dict[str, int]) -> PreTrainedModel:
    glm = _EXPERTS | {
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }
    return Glm4MoeForCausalLM(Glm4MoeConfig(**_COMMON | glm | sizes))


def _deepseek_v2(sizes: dict[str, int]) -> PreTrainedModel:
    latent = {name: value for name, value in _COMMON.items() if name != "head_dim"} | {
        "moe_intermediate_size": 64,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    }
    sized = latent | sizes
    # SGLang wants DeepSeek's rotary embedding scaled on a CPU, as it is in every released model.
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": int(str(sized["max_position_embeddings"])) // 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sized, rope_parameters=rope))


_BUILDERS: Final = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "deepseek_v2": _deepseek_v2,
}
ARCHITECTURES: Final = (
    "llama",
    "qwen3",
    "glm4_moe",
    "deepseek_v2",
)  # tested tier by tier, on one and two ranks


def build(
    arch: str,
    path: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    sizes: dict[str, int] | None = None,
) -> Path:
    """Write a checkpoint of ``arch`` (ARCHITECTURES, or "qwen3_moe") into the folder ``path``; returns that.

    ``sizes`` replaces numbers of the config, such as {"hidden_size": 256, "max_position_embeddings": 4096}.
    The same arguments give the same weights; another seed gives other weights.
    """
    generator = torch.Generator().manual_seed(seed)
    model = _BUILDERS[arch](sizes or {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator)
    path.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(path)
    _tokenizer(model.config.max_position_embeddings).save_pretrained(path)
    return path


def _fill(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if parameter.dim() < 2:
        # Norm scales stay near one; a bias moves a projection a little.
        parameter.normal_(0.0, 0.1, generator=generator)
        if name.endswith("weight"):
            parameter.add_(1.0)
    else:
        gain = 1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1])
        parameter.normal_(0.0, gain, generator=generator)


def _tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_tokens,
    )
