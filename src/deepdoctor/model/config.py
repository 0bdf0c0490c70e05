"""The shape of a supported model, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepdoctor.errors import ModelError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "ModelConfig", "known_config"]

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder; names follow ``config.json``. ``rope`` holds the scaling's own numbers."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_type: str = "default"
    rope: Mapping[str, float] = field(default_factory=dict)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` of a model folder. Raises ModelError where it is missing or broken."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            has = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
            raise ModelError(
                f"{folder} has no config.json (it has: {has or 'nothing'})",
                "give the folder of a complete Hugging Face model, a .gguf file, or a Hub id",
            ) from None
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}", "download the model again") from None
        if not isinstance(values, dict):
            raise ModelError(f"{path} must hold a JSON object, not {type(values).__name__}", "download the model again")
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "config") -> ModelConfig:
        """Check and convert the contents of a ``config.json``.

        Raises UnsupportedModelError for an architecture, activation, rope type or sliding window the decoder lacks,
        ModelError for a missing or impossible size.
        """
        for key, kind in (("architectures", list), ("quantization_config", dict), ("rope_scaling", dict)):
            if not isinstance(values.get(key), kind | None):
                raise ModelError(f"{place}: {key} is {values[key]!r}, expected a {kind.__name__}", "download it again")
        named = values.get("architectures") or ["(none)"]
        architecture = named[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{place}: architecture {architecture!r} is not supported",
                f"supported: {', '.join(ARCHITECTURES)} (R1 distills, Llama 3, Qwen2.5, Qwen3, SmolLM2, HuatuoGPT-o1)",
            )
        method = (values.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise UnsupportedModelError(
                f"{place}: weights quantised with {method} are not supported",
                "give the 16-bit model, or a bitsandbytes NF4 checkpoint (`*-bnb-4bit`)",
            )
        if values.get("use_sliding_window"):
            raise UnsupportedModelError(
                f"{place}: use_sliding_window is true; sliding-window attention is not supported"
            )
        if values.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"{place}: hidden_act {values['hidden_act']!r} is not supported, only 'silu'")

        def size(key: str, default: Any = None) -> int:
            value = values.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{place}: {key} is {value!r}, expected a positive whole number")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"{place}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        rope = dict(values.get("rope_scaling") or {})
        rope.update(values.get("rope_parameters") or {})
        rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"{place}: rope type {rope_type!r} is not supported", f"supported: {', '.join(ROPE_TYPES)}"
            )
        for key in _ROPE_NEEDS.get(rope_type, ()):
            number = rope.get(key)
            if not isinstance(number, int | float) or isinstance(number, bool) or number <= 0:
                raise ModelError(f"{place}: rope type {rope_type!r} with {key} {number!r}, expected a positive number")
        partial = rope.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise UnsupportedModelError(f"{place}: partial_rotary_factor is {partial}; only whole heads are rotated")
        theta = float(rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
        qwen2 = architecture == "Qwen2ForCausalLM"
        bias = bool(values.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=size("head_dim", max(hidden // heads, 1)),
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            max_position_embeddings=size("max_position_embeddings", 2048),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            rope_type=rope_type,
            rope=rope,
            qkv_bias=qwen2 or bias,
            o_bias=bias and not qwen2,
            mlp_bias=bool(values.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            raw=dict(values),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of all frozen projections (what NF4 quantises), without embedding, head and norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head where it is not the same matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights, norms included, biases not."""
        norms = self.hidden_size * (2 * self.num_layers + 1)
        return self.linear_parameters + self.embedding_parameters + norms

    def inverse_frequencies(self) -> tuple[list[float], float]:
        """Return the rotary frequencies, H/2 of them in radians per position, and the factor on cos and sin.

        Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); Llama 3.1's own scaling.
        """
        half = self.head_dim // 2
        plain = [self.rope_theta ** (-i / half) for i in range(half)]
        factor = float(self.rope.get("factor") or 1.0)
        if self.rope_type == "linear":
            return [f / factor for f in plain], 1.0
        if self.rope_type == "llama3":
            return [_llama3(f, factor, self.rope) for f in plain], 1.0
        if self.rope_type == "yarn":
            return _yarn(plain, factor, self)
        return plain, 1.0


def _llama3(frequency: float, factor: float, rope: Mapping[str, Any]) -> float:
    """Keep short wavelengths, divide long ones by ``factor``, blend in between."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    blend = (original / wavelength - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def _yarn(plain: list[float], factor: float, config: ModelConfig) -> tuple[list[float], float]:
    """YaRN: extrapolate fast dimensions, interpolate slow ones, ramp between, and warm attention up a little."""
    rope, dim = config.rope, config.head_dim
    original = float(rope.get("original_max_position_embeddings") or config.max_position_embeddings)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    scaled = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency / factor * ramp + frequency * (1 - ramp))

    def warm(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = warm(float(mscale)) / warm(float(all_dim)) if mscale and all_dim else warm(1.0)
    return scaled, float(attention)


# Published shapes, so that a plan can be printed without a network. Source: the models' config.json on the Hub.
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_KNOWN: dict[str, dict[str, Any]] = {
    "deepseek-r1-distill-llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA31,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "deepseek-r1-distill-qwen-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "deepseek-r1-distill-qwen-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "smollm2-135m-instruct": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def known_config(model_id: str) -> ModelConfig | None:
    """Return the published shape of a model by the last part of its id (any publisher, ``-bnb-4bit`` too), or None."""
    name = model_id.rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower()
    for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        name = name.removesuffix(suffix)
    values = _KNOWN.get(name)
    return ModelConfig.from_dict(values, model_id) if values else None
