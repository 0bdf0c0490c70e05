"""How many bytes each export takes on disk: one place for the plan, the doctor and the export's own check."""

from __future__ import annotations

from deepdoctor.export.gguf_write import gguf_bytes
from deepdoctor.export.merge import published_dtype
from deepdoctor.model.adapter import projection_sizes
from deepdoctor.model.config import ModelConfig
from deepdoctor.recipe import Recipe

__all__ = ["export_bytes"]

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits with double quantisation: a byte per 64 weights, an fp32 number per 256 of those bytes."""
_NF4_MATRIX = 2048
"""Beside that, of each matrix: two tables of codes, settings, and their entries in the file's header."""
_TOKEN_BYTES = 160
"""tokenizer.json, per token of the vocabulary (R1-Distill-Llama-8B: 17.2 MB for 128,256), and what lies beside it."""
_HEADER_BYTES = 160
"""Of each tensor in a safetensors file."""


def export_bytes(config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Bytes of every kind of export that the recipe asks for: adapter, merged, merged_4bit, gguf."""
    section, train = recipe.export, recipe.train
    sizes = projection_sizes(config)
    pairs = config.num_layers * train.lora_rank * sum(sum(sizes[target]) for target in train.target_modules)
    matrices = config.num_layers * len(sizes)
    small = _TOKEN_BYTES * config.vocab_size + 2**16
    headers = _HEADER_BYTES * (2 * matrices + 16)
    biases = config.num_layers * (config.qkv_bias + config.o_bias + config.mlp_bias) * sum(o for o, _ in sizes.values())
    width = published_dtype(config).itemsize
    dense = width * (config.parameters - config.linear_parameters + biases)
    found = {
        "adapter": 4 * pairs + headers + small,
        "merged": dense + width * config.linear_parameters + headers + small,
        "merged_4bit": dense + int(_NF4_BYTES * config.linear_parameters) + _NF4_MATRIX * matrices + headers + small,
        "gguf": sum(gguf_bytes(config, kind) for kind in section.gguf),
    }
    return {kind: size for kind, size in found.items() if getattr(section, kind)}
