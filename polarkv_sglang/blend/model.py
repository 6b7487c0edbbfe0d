"""What a pass has to know of a loaded model, and whether CacheBlend can serve it at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from polarkv_sglang.errors import PolarError
from polarkv_sglang.kernels.rotate import Rotary

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# Their layers take rows independently of each other but for attention, rotate every layer's keys alike, and
# keep the residual where rows can be dropped (SGLang 0.5.23, ``layers/layer_boundary``).
ARCHITECTURES: Final = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Glm4MoeForCausalLM",
    }
)
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM: Final = 256
# Positions at which the model's table of angles is compared with our frequencies.
_PROBES: Final = (0, 1, 2, 7, 100, 1000)


class Unsupported(PolarError):
    """CacheBlend cannot serve this model or these settings; prompts are computed in full."""


class BlendModel(NamedTuple):
    """The parts of a model that a pass works on."""

    layers: list[torch.nn.Module]  # decoder layers in order
    attentions: list[Any]  # SGLang's RadixAttention of each
    rotary: Rotary


def inspect_model(runner: ModelRunner) -> BlendModel:
    """The parts of the runner's model. Raises Unsupported with what stands in the way."""
    _check_settings(runner)
    config = runner.model_config
    architectures = config.hf_config.architectures or []
    if not ARCHITECTURES.intersection(architectures):
        raise Unsupported(f"{', '.join(architectures)} is not one of {', '.join(sorted(ARCHITECTURES))}")
    layers = list(runner.model.model.layers)
    attentions = [layer.self_attn.attn for layer in layers]
    for number, attention in enumerate(attentions):
        _check_attention(attention, number)
    rotaries = [layer.self_attn.rotary_emb for layer in layers]
    first = rotary_of(rotaries[0], runner.device)
    for number, embedding in enumerate(rotaries):
        if embedding is not rotaries[0]:
            other = rotary_of(embedding, runner.device)
            if not torch.equal(other.frequencies, first.frequencies) or other[1:] != first[1:]:
                raise Unsupported(f"layer {number} rotates its keys otherwise than layer 0")
    return BlendModel(layers, attentions, first)


def rotary_of(embedding: Any, device: str | torch.device) -> Rotary:
    """The rotation that a model's rotary embedding applies to keys.

    Raises Unsupported where angles are not position times a frequency at every position, as with dynamic
    scaling, or where dimensions are mixed in a way that one rotation does not undo.
    """
    table = getattr(embedding, "cos_sin_cache", None)
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or getattr(embedding, "position_start", None):
        raise Unsupported(f"{type(embedding).__name__} keeps no table of angles by position")
    pairs = table.shape[1] // 2
    if 2 * pairs != embedding.rotary_dim:
        raise Unsupported(f"{type(embedding).__name__} has a table of {pairs} angles for its dimensions")
    try:
        # Yarn's takes a factor, the others' take the base.
        argument = getattr(embedding, "scaling_factor", None)
        takes_factor = "scaling_factor" in embedding._compute_inv_freq.__code__.co_varnames
        frequencies = embedding._compute_inv_freq(argument if takes_factor else embedding.base)
    except (AttributeError, TypeError) as error:
        raise Unsupported(f"{type(embedding).__name__} does not tell its frequencies") from error
    frequencies = frequencies.detach().float().contiguous().to(device)
    probes = torch.tensor([position for position in _PROBES if position < len(table)], device=table.device)
    found = table[probes].float().cpu()
    angles = probes.cpu().float().outer(frequencies.cpu())
    scale = found[0, 0]  # cos(0), by which some embeddings stretch queries and keys
    expected = torch.cat([angles.cos(), angles.sin()], 1) * scale
    tolerance = 4 * torch.finfo(table.dtype).eps * max(1.0, float(scale)) + 1e-4
    if not torch.allclose(found, expected, atol=tolerance, rtol=0):
        raise Unsupported(f"{type(embedding).__name__} does not turn keys by position times frequency")
    return Rotary(frequencies, interleaved=not embedding.is_neox_style)


def _check_attention(attention: Any, number: int) -> None:
    name = f"attention of layer {number}"
    if attention.layer_id != number:
        raise Unsupported(f"{name} writes the KV of layer {attention.layer_id}")
    if attention.is_cross_attention or str(attention.attn_type.value) != "decoder":
        raise Unsupported(f"{name} is not causal self-attention")
    if attention.sliding_window_size not in (-1, None):
        raise Unsupported(f"{name} has a sliding window of {attention.sliding_window_size} tokens")
    if attention.logit_cap or attention.use_irope or attention.xai_temperature_len > 0:
        raise Unsupported(f"{name} changes its scores")
    if max(attention.qk_head_dim, attention.v_head_dim) > _MAX_HEAD_DIM:
        raise Unsupported(
            f"{name} has heads of {attention.qk_head_dim} dimensions, more than {_MAX_HEAD_DIM}"
        )


def _check_settings(runner: ModelRunner) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    arguments = runner.server_args
    pool = runner.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool:
        raise Unsupported(f"KV is kept in a {type(pool).__name__}; only plain MHA (or GQA) is supported")
    if pool.kv_cache_layout != "nhd":
        raise Unsupported(f"KV is kept in the layout {pool.kv_cache_layout}; a pass reads and writes nhd")
    if pool.dtype not in _DTYPES or pool.dtype != runner.dtype:
        raise Unsupported(
            f"KV is kept as {pool.dtype} and computed as {runner.dtype}; quantised KV is not read"
        )
    for name, off in _OFF.items():
        if not hasattr(arguments, name):
            raise Unsupported(f"this SGLang does not tell whether {name} is off")
        value = getattr(arguments, name)
        if value not in (off, None):
            raise Unsupported(f"--{name.replace('_', '-')} {value} is set")


# Settings of SGLang that a pass does not work with, and their values where they are off.
_OFF: Final[dict[str, object]] = {
    "speculative_algorithm": None,
    "pp_size": 1,
    "dp_size": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "enable_dp_attention": False,
    "enable_lora": False,
    "enable_mixed_chunk": False,
    "enable_two_batch_overlap": False,
    "enable_single_batch_overlap": False,
    "enable_hisparse": False,
    "disaggregation_mode": "null",
    "moe_a2a_backend": "none",
    "dllm_algorithm": None,
    "enable_prefill_cp": False,
    "enable_pdmux": False,
    # Embeddings and scores of several items are read from rows that a pass does not compute, and so are
    # the experts of each token.
    "is_embedding": False,
    "enable_mis": False,
    "enable_return_routed_experts": False,
    # Layers that are brought to the GPU as they are called replace their own forward methods.
    "cpu_offload_gb": 0,
    "offload_group_size": -1,
}
