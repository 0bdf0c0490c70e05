"""Tensors read ahead through a small ring against safetensors' own reader, and every file that must be refused."""

import json
import logging
import math
import mmap
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepdoctor.errors import ModelError
from deepdoctor.model.stream import Ring, StreamSource, host_empty, read_header

TINY = Ring(slots=3, slot_bytes=64, readers=3, direct_bytes=0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random values of a dtype, whole numbers up to 100 where it holds no others."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(dtype) if dtype.is_floating_point else values.mul(30).abs().clamp(max=100).to(dtype)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files: odd sizes and every dtype, tensors of many slots, a few bytes and none."""
    folder = tmp_path_factory.mktemp("shards")
    several = (torch.float64, *FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float8_e5m2)
    contents: list[dict[str, Tensor]] = [
        {f"odd.{number}": draw(7, 5 + number, dtype=dtype) for number, dtype in enumerate(several)},
        {"long": draw(1001, 3, dtype=torch.bfloat16), "longer": draw(4099), "slot": draw(16), "two": draw(4, 8)},
        {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "one": draw(1, dtype=torch.uint8)},
    ]
    for number, tensors in enumerate(contents):
        save_file(tensors, folder / f"{number}.safetensors", metadata={"format": "pt"})
    return sorted(folder.glob("*.safetensors"))


def everything(shards: list[Path]) -> dict[str, Tensor]:
    """All tensors as safetensors reads them."""
    return {name: tensor for path in shards for name, tensor in load_file(path).items()}


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return found.dtype == wanted.dtype and found.shape == wanted.shape and bits(found) == bits(wanted)


@pytest.mark.parametrize("slots", [1, 2, 40])
@pytest.mark.parametrize("slot_bytes", [16, 64, 1 << 16])
@pytest.mark.parametrize("direct_bytes", [0, 100])
def test_equals_safetensors(shards: list[Path], slots: int, slot_bytes: int, direct_bytes: int) -> None:
    """Every tensor of several shards, in an order that is not the files', comes bit for bit, whatever the ring."""
    expected = everything(shards)
    order = sorted(expected, key=lambda name: name[::-1])
    source = StreamSource(shards[0].parent, shards, "cpu", Ring(slots, slot_bytes, 3, direct_bytes))
    source.start(order)
    assert set(source.keys()) == set(expected) and "odd.1" in source and "odd" not in source
    assert all(same(source.take(name), expected[name]) for name in order)
    source.close()
    assert all(same(source.read(name), expected[name]) for name in order)


def test_header_equals_safetensors(shards: list[Path]) -> None:
    """Shapes and dtypes are known from the header alone."""
    for path in shards:
        header = read_header(path)
        for name, tensor in load_file(path).items():
            stored = header.pop(name)
            assert (stored.shape, stored.dtype, stored.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert not header


@pytest.mark.parametrize("dtype", FLOATS)
def test_fills_what_it_is_given(shards: list[Path], dtype: torch.dtype) -> None:
    """A tensor larger than the ring fills rows of a wider matrix of any dtype, rounded once, and nothing else."""
    expected = everything(shards)
    source = StreamSource(shards[0].parent, shards, "cpu", TINY)
    source.start(["long", "two"])
    whole = torch.full((1009, 3), 7.0, dtype=dtype)
    place = whole[4:1005]
    assert source.take("long", place) is place
    assert torch.equal(place, expected["long"].to(dtype)) and bool((whole[:4] == 7).all() and (whole[1005:] == 7).all())
    # Neither read ahead nor asked for in the order: read on the spot.
    assert torch.equal(source.take("slot", torch.empty(16, dtype=dtype)), expected["slot"].to(dtype))
    assert torch.equal(source.take("two"), expected["two"])
    source.close()


def readers() -> int:
    """Reading threads that are alive."""
    return sum(thread.name == "tensor-reader" for thread in threading.enumerate())


def test_closing_early_ends_the_readers(shards: list[Path]) -> None:
    """A source closed before anything was taken, or half way, leaves no thread; closing twice is harmless."""
    for taken in (0, 1, 2):
        source = StreamSource(shards[0].parent, shards, "cpu", TINY)
        names = ["longer", "long", "odd.3", "odd.1"]
        source.start(names)
        assert readers() == 3
        for name in names[:taken]:
            source.take(name)
        source.close()
        source.close()
        assert readers() == 0


def test_names_out_of_order_are_a_fault_of_ours(shards: list[Path]) -> None:
    """Taking what comes later in the order announced would wait for ever; it is refused."""
    source = StreamSource(shards[0].parent, shards, "cpu", TINY)
    source.start(["long", "two"])
    with pytest.raises(AssertionError, match="two is taken out of order"):
        source.take("two")
    source.close()


def resident_bytes() -> int:
    """Memory of this process that is resident now, mapped files included."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system does not tell resident memory in /proc")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10


def write_zeros(path: Path, count: int, numel: int) -> None:
    """A sparse file of zeros: count tensors of numel uint8."""
    header = {
        str(number): {"dtype": "U8", "shape": [numel], "data_offsets": [number * numel, (number + 1) * numel]}
        for number in range(count)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * numel)


def test_memory_stays_near_the_ring(tmp_path: Path) -> None:
    """Eight tensors of 33 MiB pass with less than two of them resident: the ring, one being taken, no file page."""
    size = 33 << 20
    write_zeros(tmp_path / "zeros.safetensors", 8, size)
    source = StreamSource(tmp_path, [tmp_path / "zeros.safetensors"], "cpu", Ring(4, 1 << 20, 2, 0))
    before = resident_bytes()
    names = [str(number) for number in range(8)]
    source.start(names)
    most = 0
    for name in names:
        tensor = source.take(name)
        most = max(most, resident_bytes())
        assert tensor.numel() == size
        del tensor
    source.close()
    assert most - before < 2 * size


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file of any header, JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "data cut off": ({"a": entry(0, 16, 4)}, bytes(15), r"its tensors end at byte \d+"),
    "data too long": ({"a": entry(0, 16, 4)}, bytes(17), r"its tensors end at byte \d+"),
    "a hole": ({"a": entry(0, 8, 2), "b": entry(12, 16, 1)}, bytes(16), r"b begins at byte \d+, the tensor before"),
    "an overlap": ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12), r"b begins at byte \d+, the tensor before"),
    "bytes and shape differ": ({"a": entry(0, 12, 4)}, bytes(12), r"12 bytes for shape \(4,\) of torch.float32"),
    "negative": ({"a": entry(0, -4, -1)}, b"", "are not all whole numbers"),
    "not JSON": (b"{'a': 1}", b"", "its header is broken"),
    "a list": ([1, 2], b"", "its header is broken"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "KeyError: 'data_offsets'"),
    "no text": (b"\xff\xfe\x00\x01", b"", "its header is broken"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_headers_are_refused(tmp_path: Path, fault: str) -> None:
    """A header that is none, or does not describe the file to its last byte, is refused with path, size and reason."""
    header, data, reason = BROKEN[fault]
    path = write(tmp_path / "m.safetensors", header, data)
    with pytest.raises(ModelError, match=reason) as caught:
        StreamSource(tmp_path, [path], "cpu")
    assert f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file" in caught.value.message
    assert caught.value.hint == "download this file again"


@pytest.mark.parametrize("content", [b"", b"\x01\x02", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 1 << 60)])
def test_files_too_short_for_their_header(tmp_path: Path, content: bytes) -> None:
    """An empty file, half a length, and a length beyond the file's end are refused."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is truncated or no safetensors file: its header is said to be"):
        read_header(path)


def test_a_file_cut_while_reading(shards: list[Path], tmp_path: Path) -> None:
    """A file that shrinks or goes away after its header was read fails in take and read, and close still returns."""
    path = tmp_path / "m.safetensors"
    for gone in (False, True):
        path.write_bytes(shards[1].read_bytes())
        source = StreamSource(tmp_path, [path], "cpu", TINY)
        if gone:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:2000])
        message = r"cannot be read: \[Errno 2\]" if gone else r"m.safetensors \(2,000 bytes\) is truncated"
        source.start(["longer", "long"])
        with pytest.raises(ModelError, match=message):
            source.take("longer")
        source.close()
        assert readers() == 0
        with pytest.raises(ModelError, match=message):
            source.read("longer")


def test_missing_and_unknown(tmp_path: Path) -> None:
    """A tensor that no shard has, and one of a dtype PyTorch lacks, are named when they are asked for."""
    path = write(tmp_path / "m.safetensors", {"a": entry(0, 3, 6, dtype="F4"), "b": entry(3, 7, 1)}, bytes(7))
    source = StreamSource(tmp_path, [path], "cpu", TINY)
    source.start(["nothing", "a", "b"])
    for ask in (source.take, source.read, source.stored):
        with pytest.raises(ModelError, match="has no tensor nothing") as caught:
            ask("nothing")
        assert caught.value.hint
    with pytest.raises(ModelError, match="a is stored as F4"):
        source.take("a")
    source.close()


class FakeCudart:
    """Notes what is registered; unregistering looks whether the memory is still there."""

    def __init__(self, result: int = 0):
        self.result = result
        self.registered: dict[int, int] = {}
        self.pages: weakref.ref[mmap.mmap] | None = None

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        """Note it."""
        self.registered[address] = nbytes
        return self.result

    def cudaHostUnregister(self, address: int) -> None:
        """Forget it, while it can still be read."""
        assert self.pages is not None and self.pages() is not None
        del self.registered[address]


def test_pinned_memory_takes_its_size_and_goes(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Exactly the tensor's bytes are pinned, from a page's first byte on, and unpinned before they are given back."""
    fake = FakeCudart()
    real = mmap.mmap

    class Pages(real):  # type: ignore[misc,valid-type]
        """Anonymous pages that can be watched."""

        def __init__(self, *args: Any, **options: Any):
            fake.pages = weakref.ref(self)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(mmap, "mmap", Pages)
    shape = (1000, 33)
    tensor = host_empty(shape, torch.bfloat16, pinned=True)
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert fake.registered == {tensor.data_ptr(): math.prod(shape) * 2} and tensor.data_ptr() % mmap.PAGESIZE == 0
    module = torch.nn.Module()
    module.register_buffer("kept", tensor.fill_(1))
    row = tensor[3]
    del tensor
    assert fake.registered
    del module
    assert not fake.registered
    assert bool((row == 1).all())
    del row
    assert fake.pages is not None and fake.pages() is None
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(result=2))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    with caplog.at_level(logging.WARNING):
        plain = host_empty(shape, torch.float32, pinned=True)
    assert plain.fill_(2).sum() == 66000 and "cannot be pinned (CUDA error 2)" in caplog.text


def test_memory_without_pinning() -> None:
    """Nothing is registered on a CPU, nor for no bytes at all."""
    assert host_empty((3, 4), torch.float16, pinned=False).shape == (3, 4)
    assert host_empty((0, 4), torch.float16, pinned=True).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [Ring(2, 64, 2, 0), Ring(5, 4096, 3, 100), Ring()])
def test_to_a_gpu(shards: list[Path], ring: Ring) -> None:
    """On a GPU what was read ahead arrives bit for bit, converted where asked, also into host memory."""
    expected = everything(shards)
    order = [name for name in sorted(expected) if name != "longer"]
    source = StreamSource(shards[0].parent, shards, "cuda", ring)
    source.start([*order, "longer"])
    assert all(same(source.take(name).cpu(), expected[name]) for name in order)
    found = source.take("longer", torch.empty(4099, dtype=torch.float16, device="cuda"))
    source.close()
    assert torch.equal(found.cpu(), expected["longer"].half())
    source = StreamSource(shards[0].parent, shards, "cuda", ring)
    source.start(["long"])
    host = host_empty((1001, 3), torch.float32, pinned=True)
    assert host.is_pinned() and torch.equal(source.take("long", host), expected["long"].float())
    source.close()


@pytest.mark.gpu
def test_a_gpu_fed_by_a_slot_in_use(tmp_path: Path) -> None:
    """A slot is refilled only after its copy: with one slot and a busy GPU the values are still right."""
    tensors = {str(number): draw(1 << 18, seed=number) for number in range(12)}
    save_file(tensors, tmp_path / "m.safetensors")
    source = StreamSource(tmp_path, [tmp_path / "m.safetensors"], "cuda", Ring(1, 1 << 18, 1, 0))
    busy = torch.randn(4096, 4096, device="cuda")
    source.start(list(tensors))
    found = []
    for name in tensors:
        busy = (busy @ busy).clamp(-1, 1)
        found.append(source.take(name))
    source.close()
    assert all(torch.equal(one.cpu(), wanted) for one, wanted in zip(found, tensors.values(), strict=True))
