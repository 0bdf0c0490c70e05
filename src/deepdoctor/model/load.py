"""Model weights from a folder of safetensors, a GGUF file, the embedded model or the Hub, tensor by tensor.

No shard is read whole: for a CPU it is mapped, for a GPU its tensors are read ahead through a ring of buffers
(``stream``). A projection is quantised as soon as it is there, so host memory stays near one matrix or the ring, and
GPU memory near what is kept. Nothing that is downloaded is executed: safetensors and JSON only.
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
from deepdoctor.model.stream import Ring, StreamSource, host_empty
from deepdoctor.model.tokenizer import Tokenizer
from deepdoctor.sizes import CONTEXT_MIB, MIB

__all__ = [
    "TensorSource",
    "check_hub_id",
    "choose_device",
    "free_memory",
    "limit_memory",
    "load_decoder",
    "load_tokenizer",
    "open_weights",
    "projection_name",
    "resolve_model",
]

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STREAMED = {"cuda": Ring()}
"""Device types whose weights are streamed from safetensors; any other maps the shards."""


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


def _indexed(device: torch.device) -> torch.device:
    """The device with its number, which some of PyTorch's functions ask for."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


def limit_memory(device: torch.device, card_mib: float) -> None:
    """Let PyTorch take no more of the GPU than it could on a card of ``card_mib``; the CUDA context takes the rest."""
    device = _indexed(device)
    total = torch.cuda.get_device_properties(device).total_memory
    share = (card_mib - CONTEXT_MIB) * MIB / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)), device)


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch may still take of this GPU, under the limit where one is set."""
    device = _indexed(device)
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    limit = torch.cuda.memory.get_per_process_memory_fraction(device) * total
    return int(min(free + reserved, limit) - allocated)


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
    check_hub_id(model_id)
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


def check_hub_id(model_id: str) -> None:
    """Raise ModelError for a model id that is no path here and cannot be ``owner/name``."""
    if model_id.startswith((".", "/", "~")) or model_id.count("/") != 1 or model_id.endswith(".gguf"):
        raise ModelError(
            f"model.id {model_id!r} is no existing folder or .gguf file, and no Hub id (owner/name)",
            "give a path that exists, `owner/name`, or embedded:smollm2-135m-instruct",
        )


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ModelError where its index is broken or a file is missing."""
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
        hint = "only safetensors are read (no pickle); convert the model with save_pretrained(safe_serialization=True)"
        raise ModelError(f"{folder} has no .safetensors file", hint)
    for shard in shards:
        if not (folder / shard).exists():
            raise ModelError(f"{folder} lacks {shard}, which its index names", "download the model again")
    return [folder / shard for shard in shards]


class TensorSource:
    """Named tensors of a safetensors folder, read one at a time from the mapped shards."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Path] = {}
        self._files = {}
        for path in _shards(folder):
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

    def __init__(self, source: TensorSource | StreamSource | _GGUFSource, place: Path, device: torch.device):
        self.source = source
        self.place = place
        self.device = device
        self._entries: dict[str, list[str]] = {}
        for key in source.keys():  # noqa: SIM118
            name, weight, _ = key.partition(".weight.")
            if weight:
                self._entries.setdefault(f"{name}.weight", []).append(key)

    def entries(self, name: str) -> list[str]:
        """The weight's name, and those of what a 4-bit checkpoint stores with it."""
        return [name, *self._entries.get(name, ())]

    def raw(self, name: str) -> Tensor:
        """Return a tensor as it is stored, whatever its shape."""
        return self.source.take(name) if isinstance(self.source, StreamSource) else self.source.read(name)

    def __call__(self, name: str, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
        """Return a tensor of that shape, or fill ``out`` (of that shape and any float dtype) with it."""
        if isinstance(self.source, StreamSource):
            stored = self.source.stored(name)
            self._check(name, stored.shape, stored.dtype, shape)
            return self.source.take(name, out)
        tensor = self.source.read(name)
        self._check(name, tuple(tensor.shape), tensor.dtype, shape)
        return tensor if out is None else out.copy_(tensor)

    def _check(self, name: str, found: tuple[int, ...], dtype: torch.dtype | str, wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise ModelError(
                f"{self.place}: {name} is {found}, expected {wanted} by config.json",
                "config.json and weights belong to different models",
            )
        if dtype not in DTYPES.values():
            raise ModelError(
                f"{self.place}: {name} is stored as {dtype}, expected float32, bfloat16 or float16",
                "give the 16-bit model, or a bitsandbytes NF4 checkpoint (`*-bnb-4bit`)",
            )


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
    embedding_on_host: bool = False,
) -> Decoder:
    """Load a base model, frozen, ready to train an adapter or answer.

    path: folder with config.json and safetensors (plain, or bitsandbytes NF4), or a .gguf file. precision: "nf4",
    "fp8" (held in bf16), "bf16", "fp16", "fp32" or "auto" (see ModelSection). compute_dtype: dtype of activations where
    the base is NF4; null takes the device's fast one. on_layer: called with (layers done, layers in all).
    embedding_on_host: leave the embedding in pinned host memory; ignored on a CPU, and where the head is the embedding.
    Raises ModelError or UnsupportedModelError naming file, tensor and expectation.
    """
    device = torch.device(device)
    source: TensorSource | StreamSource | _GGUFSource
    if device.type in STREAMED and path.suffix != ".gguf":
        config = ModelConfig.from_folder(path)
        source = StreamSource(path, _shards(path), device, STREAMED[device.type])
    else:
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
    read = _Checked(source, path, device)
    ends = (config.vocab_size, config.hidden_size)
    tied = config.tie_word_embeddings

    try:
        if isinstance(source, StreamSource):
            source.start(_reading_order(decoder, read))
        on_host = embedding_on_host and not tied and device.type != "cpu"
        if on_host:
            embedding = host_empty(ends, compute, pinned=device.type == "cuda")
        else:
            embedding = torch.empty(ends, dtype=compute, device=device)
        decoder.embedding = read(EMBEDDING, ends, embedding)
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            _load_layer(layer, config, read, held, quantised, double_quant)
            if on_layer:
                on_layer(number + 1, config.num_layers)
        decoder.norm = read("model.norm.weight", (config.hidden_size,)).to(device, compute, copy=True)
        if tied:
            decoder.head = decoder.embedding
        else:
            decoder.head = read(HEAD, ends, torch.empty(ends, dtype=compute, device=device))
    finally:
        source.close()
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    return decoder.eval()


def _reading_order(decoder: Decoder, read: _Checked) -> list[str]:
    """Names of the matrices in the order in which they are loaded."""
    names = [EMBEDDING]
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in layer.linears:
            for projection in linear.names:
                names += read.entries(f"{projection_name(layer.number, projection)}.weight")
    return names if decoder.config.tie_word_embeddings else [*names, HEAD]


def _load_layer(
    layer: DecoderLayer, config: ModelConfig, read: _Checked, held: str, quantised: bool, double_quant: bool
) -> None:
    stem = f"model.layers.{layer.number}"
    compute = layer.qkv.compute_dtype

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=read.device, dtype=compute, copy=True)

    layer.input_norm = place(read(f"{stem}.input_layernorm.weight", (config.hidden_size,)))
    layer.post_attention_norm = place(read(f"{stem}.post_attention_layernorm.weight", (config.hidden_size,)))
    if config.qk_norm:
        layer.q_norm = place(read(f"{stem}.self_attn.q_norm.weight", (config.head_dim,)))
        layer.k_norm = place(read(f"{stem}.self_attn.k_norm.weight", (config.head_dim,)))
    biased = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    for linear, has_bias in zip(layer.linears, biased.values(), strict=True):
        width = linear.in_features
        names = [projection_name(layer.number, projection) for projection in linear.names]
        if has_bias:
            biases = [read(f"{n}.bias", (s,)) for n, s in zip(names, linear.sizes, strict=True)]
            linear.bias = place(torch.cat(biases))
        if held == "nf4":
            linear.parts = tuple(
                _part(f"{n}.weight", (s, width), read, compute, quantised, double_quant)
                for n, s in zip(names, linear.sizes, strict=True)
            )
            continue
        weight = torch.empty(sum(linear.sizes), width, dtype=compute, device=read.device)
        for name, start, size in zip(names, linear.starts, linear.sizes, strict=True):
            read(f"{name}.weight", (size, width), weight[start : start + size])
        linear.weight = weight


def _part(
    name: str, shape: tuple[int, int], read: _Checked, compute: torch.dtype, quantised: bool, double_quant: bool
) -> NF4Weight | Tensor:
    """Read a projection that is NF4 as it is; keep what a 4-bit checkpoint left in 16 bits; quantise any other."""
    if f"{name}.absmax" in read.source:
        weight = read_bnb_state({key: read.raw(key) for key in read.entries(name)}, name)
        if tuple(weight.shape) != shape:
            raise ModelError(f"{read.place}: {name} is {tuple(weight.shape)}, expected {shape} by config.json")
        return weight.to(read.device)
    if quantised:
        return read(name, shape, torch.empty(shape, dtype=compute, device=read.device))
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
