"""The GGUF container: typed metadata and a table of tensors, read without loading the weights.

The header is parsed here: the ``gguf`` package's own reader makes a numpy array of every string, which took 2.6 s for
SmolLM2's vocabulary and 11 s for Llama 3's, where slicing bytes took 0.05 s and 0.15 s. Tensor types, block sizes and
dequantisation are that package's.
Source of the layout: the GGUF specification in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from deepdoctor.errors import MissingExtraError, ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DOWNLOAD_AGAIN", "GGUFFile", "StoredTensor"]

DOWNLOAD_AGAIN = "download the file again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its ggml type number, shape (outermost first), first byte and bytes in the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of one GGUF file: metadata (numbers, texts, booleans and lists of them) and tensors by GGUF name."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Parse the header of a version 2 or 3, little-endian file.

        Raises MissingExtraError without the ``gguf`` package, ModelError for a file that is missing, cut off or
        damaged, UnsupportedModelError for a tensor type that package cannot dequantise.
        """
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                f"reading {path} needs the gguf package", 'pip install "deepdoctor[gguf]"'
            ) from None
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                parsed = _Parser(path, data)
        except FileNotFoundError:
            raise ModelError(f"there is no GGUF file {path}", "check the path") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{path} cannot be read as GGUF: {error}", DOWNLOAD_AGAIN) from None
        return cls(path, parsed.metadata, parsed.tensors)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Return a metadata value of the given type, or ``default``. Raises ModelError where it has another type."""
        value = self.metadata.get(key, default)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ModelError(f"{self.path}: {key} is {value!r:.60}, expected {kind.__name__}", DOWNLOAD_AGAIN)
        return value

    def read(self, name: str) -> np.ndarray:
        """Return one tensor dequantised: C-contiguous fp32 of its shape, the caller's own copy.

        Raises ModelError where a value is infinite or not a number.
        """
        import gguf
        import numpy as np

        stored = self.tensors[name]
        rows = np.asarray(np.memmap(self.path, mode="r", offset=stored.start, shape=(stored.size,)))
        kind = gguf.GGMLQuantizationType(stored.type)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows.reshape(*stored.shape[:-1], -1), kind)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self.path} is damaged: tensor {name} ({kind.name}) has non-finite values", DOWNLOAD_AGAIN
            )
        return np.require(values, np.float32, ["C", "W"])  # fp32 comes back as a view of the read-only file: copied


class _Parser:
    """Walks the mapped header once, from the magic to the end of the tensor table."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self._data, self._at = path, data, 4
        if data[:4] != b"GGUF":
            raise ModelError(f"{path} starts with {data[:4]!r}, expected b'GGUF'", "give a .gguf file")
        (version,) = self._take("<I")
        if version not in (2, 3):
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise ModelError(
                f"{path} is {kind}; little-endian GGUF of version 2 or 3 is supported",
                "take a file made by a recent llama.cpp",
            )
        tensors, pairs = self._take("<QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(key, self._take("<I")[0])
        table = []
        for _ in range(tensors):
            name = self._string()
            (dims,) = self._take("<I")
            if not 1 <= dims <= 4:
                self._damaged(f"tensor {name} has {dims} dimensions, expected 1 to 4")
            shape = self._take(f"<{dims}Q")[::-1]
            table.append((name, shape, *self._take("<IQ")))
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            self._damaged(f"general.alignment is {align!r}, expected a positive whole number")
        base = -(-self._at // align) * align
        self.tensors = {name: self._stored(name, shape, kind, base + at) for name, shape, kind, at in table}

    def _damaged(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path} is damaged: {what}", DOWNLOAD_AGAIN)

    def _fits(self, what: str, end: int) -> None:
        if end > len(self._data):
            raise ModelError(
                f"{self.path} is cut off: {what} ends at byte {end}, the file at {len(self._data)}", DOWNLOAD_AGAIN
            )

    def _take(self, layout: str) -> tuple[Any, ...]:
        start, self._at = self._at, self._at + struct.calcsize(layout)
        self._fits("its header", self._at)
        return struct.unpack_from(layout, self._data, start)

    def _strings(self, count: int) -> list[str]:
        data, at, length, out = self._data, self._at, struct.Struct("<Q"), []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length.unpack_from(data, at)[0]
                out.append(data[start:at].decode())
        except struct.error:
            self._fits("a text", max(at + 8, len(data) + 1))
        except UnicodeDecodeError as error:
            self._fits("a text", at)  # cut inside a character
            self._damaged(f"the text at byte {start} is not UTF-8 ({error.reason})")
        self._fits("a text", at)
        self._at = at
        return out

    def _string(self) -> str:
        return self._strings(1)[0]

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            self._damaged(f"{key} has value type {kind}, expected 0 to 12")
        inner, count = self._take("<IQ")
        if inner == _STRING:
            return self._strings(count)
        if inner not in _SCALARS:
            self._damaged(f"{key} is a list of value type {inner}, expected numbers or texts")
        self._fits(key, self._at + count)  # before struct sees an absurd count
        return list(self._take(f"<{count}{_SCALARS[inner]}"))

    def _stored(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
        """Check that the type can be dequantised (on one block of zeros) and that the last byte is in the file."""
        import gguf
        import numpy as np

        try:
            known = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[known]
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), known)
        except (ValueError, KeyError, NotImplementedError):
            label = known.name if kind in list(gguf.GGMLQuantizationType) else f"number {kind}"
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has type {label}, which the installed gguf package cannot dequantise",
                "pip install --upgrade gguf, or take another quantisation such as Q8_0, Q4_K_M or F16",
            ) from None
        if min(shape) < 1 or shape[-1] % block:
            self._damaged(f"tensor {name} of type {known.name} has shape {shape}, rows must be multiples of {block}")
        total = math.prod(shape) // block * size
        self._fits(f"tensor {name}", start + total)
        return StoredTensor(kind, shape, start, total)
