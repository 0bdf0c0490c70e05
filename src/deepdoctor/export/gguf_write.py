"""A GGUF file that llama.cpp and Ollama load, written tensor by tensor from named weights.

Tensor names, the order of tensors, the row order of q and k in Llama models and the types are those of llama.cpp's
converter. Where a row is no multiple of 32 the tensor stays F16; vectors are F32. In the 4-bit kinds embedding and head
are Q8_0. Source of key names: llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdoctor.data.prompt import Prompt
from deepdoctor.errors import MissingExtraError, UnsupportedModelError
from deepdoctor.export.gguf_vocab import vocabulary
from deepdoctor.export.measure import Weights
from deepdoctor.model.config import ModelConfig

__all__ = ["GGUF_KINDS", "gguf_bytes", "write_gguf"]

GGUF_KINDS = ("f16", "q8_0", "q4_1", "q4_0")
_ARCH = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_BLOCK = 32
_SIZES = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (_BLOCK, 34), "Q4_1": (_BLOCK, 20), "Q4_0": (_BLOCK, 18)}
"""Values of a block and its bytes: the values, one fp16 scale and, in Q4_1, one fp16 minimum."""
_FINE_ROPE = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
"""Settings of YaRN that are written into no file here."""
_ROWS_AT_ONCE = 8192
"""Rows of a matrix that are converted at a time: 134 MB of fp32 where they are 4096 wide."""


@dataclass(frozen=True)
class _Entry:
    """One tensor: its names here and in the file, shape (outermost first), type, and heads whose rows are reordered."""

    name: str
    stored: str
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        block, size = _SIZES[self.kind]
        return math.prod(self.shape) // block * size


def _entries(config: ModelConfig, kind: str) -> Iterator[_Entry]:
    """Every tensor of a file in its order."""
    hidden, wide, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * head_dim, config.num_kv_heads * head_dim
    llama = config.architecture == "LlamaForCausalLM"
    fine = kind if kind in ("f16", "q8_0") else "q8_0"

    def matrix(name: str, stored: str, rows: int, width: int, wanted: str, heads: int | None = None) -> _Entry:
        held = wanted if width % _BLOCK == 0 else "f16"
        return _Entry(f"{name}.weight", f"{stored}.weight", (rows, width), held.upper(), heads)

    def vector(name: str, stored: str, size: int, heads: int | None = None) -> _Entry:
        return _Entry(name, stored, (size,), "F32", heads)

    yield matrix("model.embed_tokens", "token_embd", config.vocab_size, hidden, fine)
    yield vector("model.norm.weight", "output_norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield matrix("lm_head", "output", config.vocab_size, hidden, fine)
    projections = (
        ("self_attn.q_proj", "attn_q", query, hidden, config.qkv_bias, config.num_heads if llama else None),
        ("self_attn.k_proj", "attn_k", key, hidden, config.qkv_bias, config.num_kv_heads if llama else None),
        ("self_attn.v_proj", "attn_v", key, hidden, config.qkv_bias, None),
        ("self_attn.o_proj", "attn_output", hidden, query, config.o_bias, None),
        ("mlp.gate_proj", "ffn_gate", wide, hidden, config.mlp_bias, None),
        ("mlp.up_proj", "ffn_up", wide, hidden, config.mlp_bias, None),
        ("mlp.down_proj", "ffn_down", hidden, wide, config.mlp_bias, None),
    )
    for layer in range(config.num_layers):
        here, there = f"model.layers.{layer}", f"blk.{layer}"
        yield vector(f"{here}.input_layernorm.weight", f"{there}.attn_norm.weight", hidden)
        for name, stored, rows, width, biased, heads in projections:
            yield matrix(f"{here}.{name}", f"{there}.{stored}", rows, width, kind, heads)
            if biased:
                yield vector(f"{here}.{name}.bias", f"{there}.{stored}.bias", rows, heads)
        if config.qk_norm:
            yield vector(f"{here}.self_attn.q_norm.weight", f"{there}.attn_q_norm.weight", head_dim)
            yield vector(f"{here}.self_attn.k_norm.weight", f"{there}.attn_k_norm.weight", head_dim)
        yield vector(f"{here}.post_attention_layernorm.weight", f"{there}.ffn_norm.weight", hidden)


def gguf_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes a file takes, its vocabulary guessed at 40 bytes a token."""
    return sum(entry.nbytes for entry in _entries(config, kind)) + 40 * config.vocab_size + 2**20


def write_gguf(
    path: Path,
    weights: Weights,
    prompt: Prompt,
    kind: str,
    name: str,
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """Write one whole model.

    kind: of GGUF_KINDS. name: ``general.name``. on_tensor: called after each of the file's tensors. Values are rounded
    once, from what ``weights`` gives. Memory stays near one tensor of it and 8,192 rows in fp32.
    Raises MissingExtraError without ``gguf``; UnsupportedModelError for a tokenizer or rope settings that the format,
    or this writer, has no place for.
    """
    _need_gguf()
    import gguf

    config, tokenizer = weights.config, prompt.tokenizer
    arch = _ARCH[config.architecture]
    metadata = {"general.type": "model", "general.name": name, **_shape(config, arch)}
    metadata["general.file_type"] = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    if tokenizer.temperature is not None:
        metadata["general.sampling.temp"] = float(tokenizer.temperature)
        metadata["general.sampling.top_p"] = float(tokenizer.top_p or 1.0)
    metadata |= vocabulary(tokenizer, prompt, config.vocab_size)
    factors = _rope_factors(config)
    entries = list(_entries(config, kind))
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for entry in entries:
            type = gguf.GGMLQuantizationType[entry.kind]
            # Shape as it is: the writer only turns it where the data are given as bytes.
            writer.add_tensor_info(entry.stored, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for entry in entries:
            writer.write_tensor_data(_stored(weights.read(entry.name), entry))
            if on_tensor:
                on_tensor()
    finally:
        writer.close()


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtraError("writing GGUF needs the gguf package", 'pip install "deepdoctor[gguf]"') from None


def _shape(config: ModelConfig, arch: str) -> dict[str, Any]:
    """The ``ARCH.*`` metadata. Raises UnsupportedModelError for rope settings without a place."""
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.rope_type in ("linear", "yarn"):
        fine = [key for key in _FINE_ROPE if config.rope.get(key) is not None]
        if fine:
            raise UnsupportedModelError(
                f"rope setting {fine[0]} = {config.rope[fine[0]]} has no place in the GGUF written here",
                "export `merged` and convert it with llama.cpp's own script",
            )
        values["rope.scaling.type"] = config.rope_type
        values["rope.scaling.factor"] = float(config.rope["factor"])
        if original := config.rope.get("original_max_position_embeddings"):
            values["rope.scaling.original_context_length"] = int(original)
    return {f"{arch}.{key}": value for key, value in values.items()}


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """Divisors of the rotary frequencies, (H/2,) fp32; only Llama 3's scaling has them, and it has no metadata."""
    if config.rope_type != "llama3":
        return None
    scaled, _ = config.inverse_frequencies()
    half = config.head_dim // 2
    return np.array([config.rope_theta ** (-i / half) / value for i, value in enumerate(scaled)], np.float32)


def _stored(tensor: Tensor, entry: _Entry) -> np.ndarray:
    """A tensor's bytes as the file has them."""
    import gguf

    assert tuple(tensor.shape) == entry.shape, f"{entry.name} is {tuple(tensor.shape)}, expected {entry.shape}"
    if entry.heads is not None:
        # From Hugging Face's rotary order (first and second halves of a head) to llama.cpp's (pairs side by side).
        halves = tensor.reshape(entry.heads, 2, -1, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    kind = gguf.GGMLQuantizationType[entry.kind]
    parts = tensor.split(_ROWS_AT_ONCE)
    return np.concatenate([gguf.quants.quantize(part.to(torch.float32).contiguous().numpy(), kind) for part in parts])


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
