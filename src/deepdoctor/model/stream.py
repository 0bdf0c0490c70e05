"""Tensors of safetensors files through a small ring of host buffers to a device, read ahead by several threads.

A file's layout: 8 bytes with the length of the header (little-endian), the header (JSON: name -> dtype, shape, first
and last byte), the bytes of all tensors one after another. The header is read here and the bytes are fetched by
position, so that no shard is mapped: mapped pages count as memory of the process, the system's file cache does not.

Readers fill free slots of the ring with pieces of the tensors in the order in which they will be asked for; whoever
takes a tensor copies its pieces to where they belong and gives the slots back. On CUDA the ring is pinned and the copy
is queued on the current stream; a slot is free again when its copy is done. Memory held: the ring, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import ModelError

__all__ = ["Ring", "Stored", "StreamSource", "host_empty", "read_header"]

log = logging.getLogger(__name__)

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library allows."""
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""
BROKEN_HINT = "download this file again"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, first byte in it, bytes; dtype is torch's, or the file's word for one torch lacks."""

    path: Path
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Ring:
    """Sizes of the ring: 1 GiB in slots, pinned as they are first used (about 0.3 s in all).

    slot_bytes: a multiple of 16. readers: threads. direct_bytes: smaller tensors are read when they are asked for.
    """

    slots: int = 32
    slot_bytes: int = 32 << 20
    readers: int = min(8, os.cpu_count() or 1)
    direct_bytes: int = 1 << 20


class _Slot:
    """One host buffer, made when first used, and the copy that reads from it last."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.copied: Any = None
        """CUDA event after the copy, or None."""

    def wait(self) -> None:
        """Return once nothing reads the buffer any more."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(frozen=True)
class _Piece:
    """The bytes [start, start + nbytes) of a file: at most a slot's worth of one tensor."""

    path: Path
    start: int
    nbytes: int


class StreamSource:
    """Named tensors of a safetensors folder, the large ones read ahead in a given order.

    shards: the files. device: where `take` puts what it is given no place for. Nothing is read ahead before `start`.
    Raises ModelError where a file's header is broken or does not fit its size.
    """

    def __init__(self, folder: Path, shards: Sequence[Path], device: torch.device | str, ring: Ring | None = None):
        self.folder = folder
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # Threads do not inherit the current device.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.ring = ring or Ring()
        self._where: dict[str, Stored] = {}
        for path in shards:
            self._where.update(read_header(path))
        self._order: list[str] = []
        self._taken = 0
        self._pieces: list[_Piece] = []
        self._claimed = 0
        self._handed_out = 0
        self._ready: dict[int, _Slot | BaseException] = {}
        self._change = threading.Condition()
        self._slots: list[_Slot] = []
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def stored(self, name: str) -> Stored:
        """Shape, dtype and place of one tensor. Raises ModelError where it is missing."""
        if name not in self._where:
            raise ModelError(
                f"{self.folder} has no tensor {name}",
                "config.json and weights belong to different models; download again",
            )
        return self._where[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, read now. Raises ModelError where it is missing or cannot be read."""
        stored = self.stored(name)
        memory = torch.empty(stored.nbytes, dtype=torch.uint8)
        _read_into(memory, _Piece(stored.path, stored.start, stored.nbytes))
        return memory.view(_torch_dtype(name, stored)).view(stored.shape)

    def start(self, names: Sequence[str]) -> None:
        """Begin to read ahead. names: those `take` will be asked for, in that order; small and missing ones are left
        to `read`.
        """
        assert not self._readers
        least = max(1, self.ring.direct_bytes)
        self._order = [name for name in names if name in self._where and self._where[name].nbytes >= least]
        self._pieces = [piece for name in self._order for piece in self._cut(self._where[name])]
        self._slots = [_Slot() for _ in range(min(self.ring.slots, len(self._pieces)))]
        for slot in self._slots:
            self._free.put(slot)
        for _ in range(min(self.ring.readers, len(self._slots))):
            reader = threading.Thread(target=self._read_ahead, name="tensor-reader", daemon=True)
            self._readers.append(reader)
            reader.start()

    def take(self, name: str, out: Tensor | None = None) -> Tensor:
        """Return one tensor, read ahead where `start` was told of it.

        out: contiguous tensor of as many elements, of any dtype and on any device, to fill and return. Without it, a
        new tensor as stored: on the device where it was read ahead, else on the CPU.
        Raises ModelError where the tensor is missing or cannot be read.
        """
        stored = self.stored(name)
        if self._taken == len(self._order) or self._order[self._taken] != name:
            assert name not in self._order[self._taken :], f"{name} is taken out of order"
            tensor = self.read(name)
            return tensor if out is None else out.copy_(tensor.view(out.shape))
        dtype = _torch_dtype(name, stored)
        if out is None:
            out = torch.empty(stored.shape, dtype=dtype, device=self.device)
        target = out.view(-1)
        done = 0
        for piece in self._cut(stored):
            slot = self._next_slot()
            assert slot.memory is not None
            values = slot.memory[: piece.nbytes].view(dtype)
            place = target[done : done + values.numel()]
            done += values.numel()
            if place.is_cuda:
                if place.dtype != dtype:
                    # Converted on the device: copy_ alone would do it on the CPU, before the copy.
                    values = values.to(place.device, non_blocking=True)
                place.copy_(values, non_blocking=True)
                slot.copied = slot.copied or torch.cuda.Event(blocking=True)
                slot.copied.record(torch.cuda.current_stream(place.device))
            else:
                place.copy_(values)
            self._free.put(slot)
        self._taken += 1
        return out

    def close(self) -> None:
        """End the readers and free the ring, once its last copies are done."""
        with self._change:
            self._claimed = len(self._pieces)
        for _ in self._readers:
            self._free.put(None)
        for reader in self._readers:
            reader.join()
        for slot in self._slots:
            slot.wait()
        self._readers, self._slots, self._free = [], [], queue.SimpleQueue()
        self._ready.clear()

    def _cut(self, stored: Stored) -> Iterator[_Piece]:
        size = self.ring.slot_bytes
        for at in range(0, stored.nbytes, size):
            yield _Piece(stored.path, stored.start + at, min(size, stored.nbytes - at))

    def _next_slot(self) -> _Slot:
        """Wait for the next piece in order; raise here what its reader met."""
        with self._change:
            self._change.wait_for(lambda: self._handed_out in self._ready)
            found = self._ready.pop(self._handed_out)
            self._handed_out += 1
        if isinstance(found, BaseException):
            raise found
        return found

    def _read_ahead(self) -> None:
        """One reader: fill free slots with the next pieces until there are none."""
        cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if cuda else contextlib.nullcontext():
            # A slot first and a piece second: so the earliest piece that nobody has read yet never lacks a slot.
            while (slot := self._free.get()) is not None:
                with self._change:
                    number = self._claimed
                    self._claimed += 1
                if number >= len(self._pieces):
                    return
                found: _Slot | BaseException = slot
                try:
                    slot.wait()
                    if slot.memory is None:
                        slot.memory = host_empty((self.ring.slot_bytes,), torch.uint8, pinned=cuda)
                    _read_into(slot.memory, self._pieces[number])
                except BaseException as error:
                    found = error
                with self._change:
                    self._ready[number] = found
                    self._change.notify_all()


def read_header(path: Path) -> dict[str, Stored]:
    """Return every tensor of a safetensors file by name.

    Raises ModelError where the header is no safetensors header or does not describe the file to its last byte.
    """
    size = path.stat().st_size

    def refuse(reason: str) -> ModelError:
        return ModelError(f"{path} ({size:,} bytes) is truncated or no safetensors file: {reason}", BROKEN_HINT)

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise refuse(f"its header is said to be {length:,} bytes long")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
        header.pop("__metadata__", None)
        found = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"its header is broken ({type(error).__name__}: {error})") from None
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != end:
            raise refuse(f"{name} begins at byte {stored.start:,}, the tensor before it ends at {end:,}")
        end += stored.nbytes
    if end != size:
        raise refuse(f"its tensors end at byte {end:,}")
    return found


def _entry(path: Path, data: int, entry: dict[str, Any]) -> Stored:
    """One entry of a header; ValueError, KeyError or TypeError where it is none."""
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"offsets {first}, {last} and shape {shape} are not all whole numbers")
    dtype = DTYPES.get(entry["dtype"], str(entry["dtype"]))
    if isinstance(dtype, torch.dtype) and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{last - first} bytes for shape {shape} of {dtype}")
    return Stored(path, dtype, shape, data + first, last - first)


def _torch_dtype(name: str, stored: Stored) -> torch.dtype:
    if isinstance(stored.dtype, str):
        raise ModelError(f"{stored.path}: {name} is stored as {stored.dtype}, which PyTorch has no dtype for")
    return stored.dtype


def _read_into(memory: Tensor, piece: _Piece) -> None:
    """Fill the first bytes of memory (bytes,) uint8 from the file. Raises ModelError where they cannot be had."""
    view = memoryview(memory.numpy().data)[: piece.nbytes]
    done = 0
    try:
        # Unbuffered: readinto goes straight to the buffer, without Python's lock.
        with open(piece.path, "rb", buffering=0) as file:
            file.seek(piece.start)
            while done < piece.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    size = piece.path.stat().st_size
                    raise ModelError(
                        f"{piece.path} ({size:,} bytes) is truncated: it was longer when its header was read",
                        BROKEN_HINT,
                    )
                done += count
    except OSError as error:
        raise ModelError(f"{piece.path} cannot be read: {error}", "check the disk, or " + BROKEN_HINT) from None


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Return uninitialised host memory as a tensor; pinned: page-locked for CUDA, so that copies need not wait.

    Unlike PyTorch's own pinned memory it takes no more than its size (not the next power of two) and goes back to the
    system with the tensor. Views that outlive the tensor stay valid, but are no longer pinned. Where the driver will
    not pin it, plain memory is returned, with a warning in the log.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not pinned or not nbytes:
        return torch.empty(shape, dtype=dtype)
    # Whole pages of its own: two registrations may not share one.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    address = tensor.data_ptr()
    cudart = torch.cuda.cudart()
    failed = int(cudart.cudaHostRegister(address, nbytes, PORTABLE))
    if not failed:
        # Runs before the memory is given back. At exit the driver does it, and may be gone before us.
        weakref.finalize(tensor, cudart.cudaHostUnregister, address).atexit = False
        return tensor
    log.warning("%d MiB of host memory cannot be pinned (CUDA error %d): copies will be slower", nbytes >> 20, failed)
    with contextlib.suppress(RuntimeError):
        # The failed call left an error behind, which the next launch reports.
        torch.zeros(1, device="cuda")
    return tensor
