"""Tiny random models of every supported family, written by transformers as the oracle."""

import warnings
from pathlib import Path

import torch

ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def tiny_model(family: str, vocab_size: int = 640, seed: int = 0, **config):
    """Return a random two-layer "llama", "qwen2" or "qwen3" in fp32, its weights large enough to tell faults apart."""
    import transformers

    named = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    if family == "qwen3":
        sizes["head_dim"] = 32
    settings = getattr(transformers, f"{named}Config")(**(sizes | config))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{named}ForCausalLM")(settings).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return model


def save_tiny_model(folder: Path, family: str, **config):
    """Write a tiny model's config and safetensors beside whatever the folder holds; return the transformers model."""
    model = tiny_model(family, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model
