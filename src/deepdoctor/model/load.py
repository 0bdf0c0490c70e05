"""Model weights from a folder of safetensors, a GGUF file, the embedded model or the Hub, tensor by tensor.

Each shard is mapped, never read whole; a projection is quantised as soon as it is read, so host memory stays near one
matrix. Nothing that is downloaded is executed: safetensors and JSON only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepdoctor.errors import HubError, KernelInputError, ModelError, TrainingError
from deepdoctor.kernels.nf4 import NF4Weight, quantize_nf4
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import Decoder, DecoderLayer
from deepdoctor.model.quantize import check_bnb_config, is_bnb_config, read_bnb_state
from deepdoctor.model.tokenizer import Tokenizer

__all__ = [
    "TensorSource",
    "choose_device",
    "load_decoder",
    "load_tokenizer",
    "open_weights",
    "projection_name",
    "resolve_model",
]

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*"]


def choose_device(wanted: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``. Raises TrainingError where a GPU is asked for in vain."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise TrainingError(
            "model.device is cuda, but PyTorch sees no CUDA device",
            f"torch is {torch.__version__}; install a CUDA build, or set `--model.device cpu`",
        )
    return torch.device("cpu")


def resolve_model(model_id: str, revision: str | None = None) -> Path:
    """Return a local folder (or .gguf file) for a model id, downloading from the Hub where needed.

    Raises ModelError for a path that does not exist and HubError where the Hub cannot be reached.
    """
    if model_id.startswith("embedded:"):
        from deepdoctor.model.embedded import embedded_model

        return embedded_model(model_id.removeprefix("embedded:"))
    path = Path(model_id).expanduser()
    if path.exists():
        return path
    if model_id.startswith((".", "/", "~")) or model_id.count("/") != 1 or model_id.endswith(".gguf"):
        raise ModelError(
            f"model.id {model_id!r} is no existing folder or .gguf file, and no Hub id (owner/name)",
            "give a path that exists, `owner/name`, or embedded:smollm2-135m-instruct",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise HubError(
            f"model {model_id}{at} is not in the local cache and could not be downloaded ({type(error).__name__})",
            "connect to the internet and run again, or download the model elsewhere and give its folder: "
            "`--model.id /path/to/model`",
        ) from None


class TensorSource:
    """Named tensors of a safetensors folder, read one at a time from the mapped shards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = dict(names)
            except (OSError, ValueError, KeyError, TypeError) as error:
                kind = type(error).__name__
                raise ModelError(f"{index} is broken ({kind}: {error})", "download the model again") from None
            shards = sorted(set(names.values()))
        else:
            shards = sorted(p.name for p in folder.glob("*.safetensors") if p.name != "adapter_model.safetensors")
        if not shards:
            hint = (
                "only safetensors are read (no pickle); convert the model with save_pretrained(safe_serialization=True)"
            )
            raise ModelError(f"{folder} has no .safetensors file", hint)
        self._files = {}
        for shard in shards:
            path = folder / shard
            if not path.exists():
                raise ModelError(f"{folder} lacks {shard}, which its index names", "download the model again")
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise ModelError(
                    f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}", "download this file again"
                ) from None
            self._files[path] = handle
            self._where.update(dict.fromkeys(handle.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored, without reading the values."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU. Raises ModelError where it is missing."""
        if name not in self._where:
            raise ModelError(
                f"{self.folder} has no tensor {name}",
                "config.json and weights belong to different models; download again",
            )
        return self._files[self._where[name]].get_tensor(name)

    def close(self) -> None:
        """Unmap the shards."""
        self._stack.close()


def projection_name(layer: int, projection: str) -> str:
    """Return the checkpoint's name of a projection, e.g. ``model.layers.0.mlp.up_proj``."""
    group = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{group}.{projection}"


class _Checked:
    """Reads tensors and refuses any whose shape is not the one the config promises."""

    def __init__(self, read: Callable[[str], Tensor], place: Path, device: torch.device):
        self._read = read
        self.place = place
        self.device = device

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.place}: {name} is {tuple(tensor.shape)}, expected {shape} by config.json",
                "config.json and weights belong to different models",
            )
        if tensor.dtype not in DTYPES.values():
            raise ModelError(
                f"{self.place}: {name} is stored as {tensor.dtype}, expected float32, bfloat16 or float16",
                "give the 16-bit model, or a bitsandbytes NF4 checkpoint (`*-bnb-4bit`)",
            )
        return tensor


def open_weights(path: Path) -> tuple[ModelConfig, TensorSource | _GGUFSource]:
    """Open a model folder or .gguf file: its config and its named tensors. The caller closes the source."""
    if path.is_file() and path.suffix == ".gguf":
        source = _GGUFSource(path)
        return ModelConfig.from_dict(source.config, str(path)), source
    config = ModelConfig.from_folder(path)
    return config, TensorSource(path)


def load_decoder(
    path: Path,
    precision: str = "auto",
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    on_layer: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load a base model, frozen, ready to train an adapter or answer.

    path: folder with config.json and safetensors (plain, or bitsandbytes NF4), or a .gguf file. precision: "nf4",
    "bf16", "fp16", "fp32" or "auto" (see ModelSection). compute_dtype: dtype of activations where the base is NF4; null
    takes the device's fast one. on_layer: called with (layers done, layers in all).
    Raises ModelError or UnsupportedModelError naming file, tensor and expectation.
    """
    device = torch.device(device)
    config, source = open_weights(path)
    quantised = is_bnb_config(dict(config.raw))
    if quantised:
        check_bnb_config(dict(config.raw))
        if precision not in ("auto", "nf4"):
            raise ModelError(
                f"{path} holds bitsandbytes 4-bit weights, but model.precision is {precision}",
                "set `--model.precision nf4`, or give the 16-bit model",
            )
    from deepdoctor.model.precision import resolve_precision

    held, compute = resolve_precision("nf4" if quantised else precision, device, compute_dtype)
    decoder = Decoder(config, compute, held)
    read = _Checked(source.read, path, device)
    hidden, vocab = config.hidden_size, config.vocab_size

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=compute, copy=True)

    try:
        decoder.embedding = place(read("model.embed_tokens.weight", (vocab, hidden)))
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            _load_layer(layer, config, read, source, held, place, quantised, double_quant)
            if on_layer:
                on_layer(number + 1, config.num_layers)
        decoder.norm = place(read("model.norm.weight", (hidden,)))
        tied = config.tie_word_embeddings
        decoder.head = decoder.embedding if tied else place(read("lm_head.weight", (vocab, hidden)))
    finally:
        source.close()
    decoder.to(device)
    return decoder.eval()


def _load_layer(
    layer: DecoderLayer,
    config: ModelConfig,
    read: _Checked,
    source: TensorSource | _GGUFSource,
    held: str,
    place: Callable[[Tensor], Tensor],
    quantised: bool,
    double_quant: bool,
) -> None:
    stem = f"model.layers.{layer.number}"
    layer.input_norm = place(read(f"{stem}.input_layernorm.weight", (config.hidden_size,)))
    layer.post_attention_norm = place(read(f"{stem}.post_attention_layernorm.weight", (config.hidden_size,)))
    if config.qk_norm:
        layer.q_norm = place(read(f"{stem}.self_attn.q_norm.weight", (config.head_dim,)))
        layer.k_norm = place(read(f"{stem}.self_attn.k_norm.weight", (config.head_dim,)))
    biased = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    for linear, has_bias in zip(layer.linears, biased.values(), strict=True):
        names = [projection_name(layer.number, projection) for projection in linear.names]
        if has_bias:
            biases = [read(f"{n}.bias", (s,)) for n, s in zip(names, linear.sizes, strict=True)]
            linear.bias = place(torch.cat(biases))
        if held != "nf4":
            parts = [
                place(read(f"{n}.weight", (s, linear.in_features))) for n, s in zip(names, linear.sizes, strict=True)
            ]
            linear.weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            continue
        linear.parts = tuple(
            _part(f"{n}.weight", (s, linear.in_features), read, source, place, quantised, double_quant)
            for n, s in zip(names, linear.sizes, strict=True)
        )


def _part(
    name: str,
    shape: tuple[int, int],
    read: _Checked,
    source: TensorSource | _GGUFSource,
    place: Callable[[Tensor], Tensor],
    quantised: bool,
    double_quant: bool,
) -> NF4Weight | Tensor:
    """Read a projection that is NF4 as it is; keep what a 4-bit checkpoint left in 16 bits; quantise any other."""
    if f"{name}.absmax" in source:
        prefix = f"{name}."
        names = [key for key in list(source.keys()) if key.startswith(prefix)]
        stored = {key: source.read(key) for key in (name, *names)}
        weight = read_bnb_state(stored, name)
        if tuple(weight.shape) != shape:
            raise ModelError(f"{read.place}: {name} is {tuple(weight.shape)}, expected {shape} by config.json")
        return weight.to(read.device)
    if quantised:
        return place(read(name, shape))
    try:
        return quantize_nf4(read(name, shape).to(read.device), double_quant=double_quant)
    except KernelInputError as error:
        raise ModelError(f"{read.place}: {name}: {error.message}", error.hint) from None


class _GGUFSource:
    """The tensors of a GGUF file under their Hugging Face names."""

    def __init__(self, path: Path):
        from deepdoctor.model.gguf import read_gguf

        self.file = read_gguf(path)
        self.config = self.file.config
        self._tensors = dict(self.file.tensors())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor, dequantised, fp32. Raises ModelError where it is missing."""
        if name not in self._tensors:
            raise ModelError(f"the GGUF file has no tensor {name}", "it may be of an unsupported architecture")
        return self._tensors[name]

    def close(self) -> None:
        """Drop the tensors."""
        self._tensors.clear()


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a model folder or .gguf file. Raises ModelError where it is missing or loses text."""
    if path.is_file() and path.suffix == ".gguf":
        from deepdoctor.model.gguf import read_gguf

        return read_gguf(path).tokenizer()
    return Tokenizer.from_folder(path)
