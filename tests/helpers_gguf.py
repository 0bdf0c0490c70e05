"""Small GGUF files: random weights of a transformers model, in llama.cpp's names, row order and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from deepdoctor.model.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def build_model(arch: str, **config: Any) -> Any:
    """A random transformers model of the architecture, norms and biases not trivial."""
    import transformers

    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    settings = getattr(transformers, f"{kinds[arch]}Config")(**{**SIZES, **config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kinds[arch]}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def write_gguf(
    path: Path,
    arch: str,
    model: Any,
    kind: str = "F32",
    *,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    label: str | None = None,
) -> Path:
    """Write the model as llama.cpp's converter does, matrices as ``kind``.

    keys: metadata to add, change or (None) leave out. extra: more tensors. label: another general.architecture.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, label or arch)
    values = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        **({f"{arch}.attention.key_length": config.head_dim} if arch == "qwen3" else {}),
        **(keys or {}),
    }
    for key, value in values.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.detach().numpy()
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            data = data.reshape(heads[part], 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        stored = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(short, gguf.quants.quantize(np.ascontiguousarray(data), stored), raw_dtype=stored)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_r1_gguf(path: Path, r1: Tokenizer) -> Path:
    """Write a tiny llama file with the vocabulary, template and sampling advice of an R1-like tokenizer."""
    values = json.loads(r1.core.to_str())
    size = r1.vocab_size
    special = {t["id"]: 3 if t["content"].startswith("<｜") else 4 for t in values["added_tokens"]}
    keys = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": 0.95,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": r1.bos_id,
        "tokenizer.ggml.eos_token_id": r1.eos_id,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.padding_token_id": r1.eos_id,
        "tokenizer.chat_template": r1.chat_template,
        "tokenizer.ggml.token_type": [special.get(n, 1) for n in range(size)],
        "tokenizer.ggml.tokens": [r1.token(n) for n in range(size)],
        "tokenizer.ggml.merges": [" ".join(m) for m in values["model"]["merges"]],
    }
    model = build_model("llama", vocab_size=size, tie_word_embeddings=True)
    return write_gguf(path, "llama", model, keys=keys)
