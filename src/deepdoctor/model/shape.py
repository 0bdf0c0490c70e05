"""A model's shape and size before its weights are there: published, from a local file, or from its small files.

Of a model on the Hub, ``config.json`` and the index of its shards are fetched, and no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepdoctor.errors import HubError, ModelError
from deepdoctor.model.config import ModelConfig, known_config
from deepdoctor.model.load import check_hub_id, resolve_model
from deepdoctor.model.quantize import is_bnb_config

__all__ = ["Shape", "cached_model", "model_shape"]

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_NF4_BYTES = 0.516
"""Of a weight in a 4-bit checkpoint, scales included."""


@dataclass(frozen=True)
class Shape:
    """A model before it is loaded. note: where the shape is from, in words. is_nf4: whether it was published in 4 bits.

    download_bytes: what is still to be fetched from the Hub; 0 where all is here.
    """

    config: ModelConfig
    note: str
    is_nf4: bool = False
    download_bytes: int = 0


def model_shape(model_id: str, revision: str | None = None, ask_hub: bool = True) -> Shape:
    """Return the shape of a model; its weights are neither read nor downloaded.

    ask_hub: fetch ``config.json`` and the shards' index where they are not in the local cache. Raises ModelError for a
    path or id that cannot be a model, UnsupportedModelError for another architecture, HubError where the Hub has to be
    asked and cannot be, or may not.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _local(ModelConfig.from_folder(path), f"shape from {path / CONFIG}")
    if path.is_file() and path.suffix == ".gguf":
        from deepdoctor.model.gguf import read_gguf

        return Shape(ModelConfig.from_dict(read_gguf(path).config, str(path)), f"shape from {path}")
    known = known_config(model_id)
    if model_id.startswith("embedded:"):
        config = known or ModelConfig.from_folder(resolve_model(model_id))
        return Shape(config, f"shape of {model_id} as published")
    check_hub_id(model_id)
    cached = cached_model(model_id, revision)
    if known is not None:
        nf4 = model_id.lower().endswith("-bnb-4bit")
        size = 0 if cached is not None else _weights(known, nf4, None)
        return Shape(known, f"shape of {model_id} as published", nf4, size)
    if cached is not None:
        return _local(ModelConfig.from_folder(cached), "shape from the model in the Hub's cache")
    return _from_hub(model_id, revision, ask_hub)


def cached_model(model_id: str, revision: str | None) -> Path | None:
    """Folder of a model whose weights are all in the local cache, or None. Asks nobody."""
    config = _cached(model_id, CONFIG, revision)
    if config is None:
        return None
    folder = config.parent
    names = _shard_names(folder / INDEX) or {path.name for path in folder.glob("*.safetensors")}
    return folder if names and all((folder / name).is_file() for name in names) else None


def _local(config: ModelConfig, note: str) -> Shape:
    return Shape(config, note, is_bnb_config(dict(config.raw)))


def _from_hub(model_id: str, revision: str | None, ask_hub: bool) -> Shape:
    path = _small_file(model_id, CONFIG, revision, ask_hub)
    if path is None:
        raise HubError(
            f"the shape of {model_id} is not known here, and its {CONFIG} is not in the local cache",
            "`deepdoctor plan RECIPE` fetches it",
        )
    config = ModelConfig.from_folder(path.parent)
    index = _small_file(model_id, INDEX, revision, ask_hub)
    nf4 = is_bnb_config(dict(config.raw))
    note = f"shape from {model_id}'s {CONFIG}; no weights were fetched"
    return Shape(config, note, nf4, _weights(config, nf4, index))


def _weights(config: ModelConfig, nf4: bool, index: Path | None) -> int:
    """Bytes of a model's safetensors: as its index says, else reckoned from its shape."""
    found = _json(index).get("metadata") if index is not None else None
    total = found.get("total_size") if isinstance(found, dict) else None
    if isinstance(total, int | float) and total > 0:
        return int(total)
    named = str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "bfloat16")
    width = 4 if named.endswith("float32") else 2
    rest = config.parameters - config.linear_parameters
    return int(config.linear_parameters * (_NF4_BYTES if nf4 else width)) + rest * width


def _small_file(model_id: str, name: str, revision: str | None, ask_hub: bool) -> Path | None:
    """A file of a repository from the cache, else from the Hub; None where it is not to be had, or has none."""
    found = _cached(model_id, name, revision)
    if found is not None or not ask_hub:
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(hf_hub_download(model_id, name, revision=revision))
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
        if name != CONFIG:
            return None
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(
                f"{model_id}{at} has no {name} on the Hub",
                "give a model in Hugging Face's format, or download a .gguf file and give its path",
            ) from None
        raise HubError(
            f"{name} of {model_id}{at} is not in the local cache and could not be fetched ({type(error).__name__})",
            "check the name and revision, connect to the internet, and for a gated model `deepdoctor login`; or give "
            "a local folder: `--model.id /path/to/model`",
        ) from None


def _cached(model_id: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _shard_names(index: Path) -> set[str]:
    """Names of the shards by an index; empty where there is none, or it is broken."""
    found = _json(index).get("weight_map")
    return {str(name) for name in found.values()} if isinstance(found, dict) else set()


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
