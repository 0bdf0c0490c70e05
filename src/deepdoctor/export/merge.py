"""Merged weights ``W + scale B A``, streamed tensor by tensor into safetensors that plain transformers loads.

The sum is taken in fp32 and rounded once to the dtype the base is published in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepdoctor.kernels.nf4 import dequantize_nf4
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.load import open_weights, projection_name
from deepdoctor.model.quantize import quantized_names, read_bnb_state

__all__ = ["merge"]

SHARD_BYTES = 4 * 2**30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _tensors(source: Any, adapter: Adapter, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the merged model under its published name."""
    projections = {
        f"{projection_name(layer, target)}.weight": (layer, target)
        for layer in range(config.num_layers)
        for target in adapter.settings.targets
    }
    names = list(source.keys())
    quantised = set(quantized_names(names))
    for name in names:
        if name.rsplit(".weight.", 1)[0] + ".weight" in quantised - {name}:
            continue  # absmax, quant_map, quant_state: state of a weight that is written dense
        if name in quantised:
            stored = {key: source.read(key) for key in names if key == name or key.startswith(f"{name}.")}
            tensor = dequantize_nf4(read_bnb_state(stored, name), torch.float32)
        else:
            tensor = source.read(name)
        if name in projections:
            delta = adapter.delta(*projections[name])
            assert delta is not None
            tensor = tensor.float() + delta.to(tensor.device)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def published_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype the base is published in; bf16 where the config does not say."""
    named = str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return _DTYPES.get(named, torch.bfloat16)


def merge(base: Path, adapter: Adapter, folder: Path, on_tensor: Callable[[], None] | None = None) -> torch.dtype:
    """Write the merged model into ``folder``: safetensors (in shards of 4 GiB), index, config.json.

    base: folder or .gguf file of the base. adapter: on the CPU. Returns the dtype written. Memory stays near one shard.
    """
    config, source = open_weights(base)
    dtype = published_dtype(config)
    shards: list[dict[str, Tensor]] = [{}]
    written: list[tuple[Path, list[str]]] = []
    size = total = 0

    def flush() -> None:
        path = folder / f"part-{len(written):05d}.safetensors"
        save_file(shards[0], path, metadata={"format": "pt"})
        written.append((path, list(shards[0])))
        shards[0] = {}

    try:
        for name, tensor in _tensors(source, adapter, config, dtype):
            if size and size + tensor.nbytes > SHARD_BYTES:
                flush()
                size = 0
            shards[0][name] = tensor.contiguous()
            size += tensor.nbytes
            total += tensor.nbytes
            if on_tensor:
                on_tensor()
        flush()
    finally:
        source.close()
    _name_shards(folder, written, total)
    values = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    values.pop("dtype", None)
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return dtype


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the parts the names transformers looks for, with an index where there are several."""
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(written, 1):
        target = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / target)
        index.update(dict.fromkeys(names, target))
    values = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
