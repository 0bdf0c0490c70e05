"""The kernels of a decode step at the shapes of an 8B Llama: time inside a CUDA graph beside that of the bytes.

    python benchmarks/bench_decode_kernels.py [--groups thin,lora,dense,attention,store] [--rows 1,16,32]
        [--tilings] [--slots 1,64,256] [--length 700] [--bandwidth TB/s] [--out FILE]

Calls over inputs that take turns are captured together, so that weights and keys come from memory and not from the L2
cache, and launches cost nothing. Per case: median microseconds a call over replays, TB/s of the bytes that must be
read, and the time that those bytes take at the measured copy bandwidth (or at --bandwidth).

thin       ThinLinear with adapter: what it chooses, Triton's kernel, and with --tilings that kernel's tilings (rows of
           W a program, spans that weights are loaded ahead, most registers of a thread, programs per multiprocessor)
lora       thin_lora
dense      the way for more rows: dequantise and multiply
attention  paged_attention over pieces; every slot has --length positions, in blocks of 64 in random places
store      rope_and_store

A case that fails leaves its error, and the rest goes on. Writes benchmarks/results/decode_kernels_<gpu>_<date>.json.
--tiny: on a CPU, small, without graphs; for trying the script out, writes only with --out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench_common import copy_rate, device_name, sample_us, write_results
from bench_shapes import Bench, Shape
from deepdoctor.kernels.bordered_nf4 import write_base
from deepdoctor.kernels.choose import Impl
from deepdoctor.kernels.nf4 import NF4Weight, quantize_nf4
from deepdoctor.kernels.nf4_thin import ThinLinear, thin_lora
from deepdoctor.kernels.paged_attention import paged_attention, paged_scratch_elements, rope_and_store

ROTATE_BYTES = 200 << 20
"""Inputs that take turns are at least this many bytes together: four times the L2 cache of an H100."""
CALLS = 20
"""Calls in a graph, at least."""
REPLAYS = 20
BLOCK = 64
NF4_BYTES = 0.516
"""Bytes of a weight: 4 bits, and its share of the scales."""
SPLITS = (1, 2, 4, 8, 16, 32)
TILINGS: tuple[dict[str, Any] | None, ...] = (
    None,
    {},
    {"rows": 16, "ahead": 1, "registers": 96},
    {"rows": 16, "ahead": 1, "registers": 128},
    {"rows": 16, "ahead": 2, "registers": 112},
    {"rows": 16, "ahead": 2, "registers": 136},
    {"rows": 16, "ahead": 2, "registers": 168},
    {"rows": 16, "ahead": 2, "registers": 112, "programs": 10},
    {"rows": 16, "ahead": 2, "registers": 112, "programs": 20},
    {"rows": 32, "ahead": 1, "programs": 8},
)
"""None: what is chosen where nothing is asked for; {}: Triton's kernel as it chooses by itself."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Something to time. make: calls that differ in their inputs; nbytes: what one of them must read."""

    group: str
    name: str
    rows: int
    variant: str
    nbytes: float
    make: Callable[[], Sequence[Call]]


def turns(nbytes: float) -> int:
    """How many sets of inputs do not fit the GPU's cache; two on a CPU."""
    return max(2, -(-ROTATE_BYTES // int(nbytes))) if torch.cuda.is_available() else 2


def graph_us(calls: Sequence[Call]) -> list[float]:
    """Microseconds of a call, one for each replay of a graph that holds all calls; no graph on a CPU."""
    if not torch.cuda.is_available():
        return sample_us(calls[:2], 2)
    calls = [calls[n % len(calls)] for n in range(max(CALLS, len(calls)))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [us / len(calls) for us in sample_us([graph.replay], REPLAYS)]


class Products:
    """The product of one frozen matrix (O, I) with adapters of R ranks. parts: widths of its projections."""

    def __init__(self, bench: Bench, name: str, out: int, inn: int, parts: list[int]):
        self.bench, self.name, self.out, self.inn, self.parts = bench, name, out, inn, parts
        self.rank = bench.shape.rank * len(parts)
        self.nbytes = NF4_BYTES * out * inn

    @functools.cached_property
    def weights(self) -> list[list[NF4Weight]]:
        """As many copies as take turns, each a list of parts."""
        copies = range(turns(self.nbytes))
        return [[quantize_nf4(self.bench.random(size, self.inn)) for size in self.parts] for _ in copies]

    def thin(self, rows: int, settings: dict[str, Any] | None) -> Sequence[Call]:
        """Thin products; settings: of the tiling."""
        bench, tiling = self.bench, None
        impl: Impl = "triton" if bench.device != "cpu" and settings is not None else "auto"
        if impl == "triton" and settings:
            from deepdoctor.kernels.nf4_thin_triton import ThinTiling

            tiling = ThinTiling(**settings)
        x, y, u = bench.random(rows, self.inn), bench.random(rows, self.out), bench.random(rows, self.rank)
        lora = bench.random(self.out, self.rank)
        linears = [ThinLinear(parts, bench.dtype, lora=lora, impl=impl, tiling=tiling) for parts in self.weights]
        scratch = torch.empty(linears[0].scratch_elements(rows), device=bench.device)
        return [functools.partial(linear, x, y, u, scratch) for linear in linears]

    def lora(self, rows: int) -> Sequence[Call]:
        """The adapters' half of it."""
        x, u = self.bench.random(rows, self.inn), self.bench.random(rows, self.rank)
        a = self.bench.random(turns(2 * self.rank * self.inn), self.rank, self.inn)
        mask = self.bench.random(rows, 1).fill_(1)
        return [functools.partial(thin_lora, x, one, u, mask) for one in a.unbind(0)]

    def dense(self, rows: int) -> Sequence[Call]:
        """Dequantise and multiply."""
        x, y = self.bench.random(rows, self.inn), self.bench.random(rows, self.out)
        w = self.bench.random(self.out, self.inn)

        def call(parts: Sequence[NF4Weight]) -> None:
            write_base(w, parts)
            torch.mm(x, w.T, out=y)

        return [functools.partial(call, parts) for parts in self.weights]

    def cases(self, row_counts: Sequence[int], tilings: Sequence[dict[str, Any] | None]) -> Iterator[Case]:
        """All of the above."""
        for rows in row_counts:
            for settings in tilings:
                variant = (
                    "chosen" if settings is None else "Triton " + " ".join(f"{k} {v}" for k, v in settings.items())
                )
                make = functools.partial(self.thin, rows, settings)
                yield Case("thin", self.name, rows, variant, self.nbytes, make)
            nbytes = 2.0 * self.rank * self.inn
            yield Case("lora", self.name, rows, "", nbytes, functools.partial(self.lora, rows))
            yield Case("dense", self.name, rows, "", self.nbytes, functools.partial(self.dense, rows))


class Paged:
    """Attention of one token per slot, every slot at the same length."""

    def __init__(self, bench: Bench, slots: int, length: int):
        self.bench, self.slots, self.length = bench, slots, length
        shape = bench.shape
        self.width = -(-length // BLOCK)
        self.nbytes = 4.0 * slots * length * shape.key_heads * shape.head_dim
        self.table = torch.randperm(slots * self.width, device=bench.device).view(slots, self.width).int()
        self.lengths = torch.full((slots,), length, device=bench.device, dtype=torch.int32)
        self.qkv = bench.random(slots, shape.heads + 2 * shape.key_heads, shape.head_dim)

    @functools.cached_property
    def caches(self) -> Tensor:
        """As many caches of one layer as take turns, (turns, 2, blocks, K, 64, H)."""
        shape = self.bench.shape
        size = (self.slots * self.width, shape.key_heads, BLOCK, shape.head_dim)
        return self.bench.random(turns(self.nbytes), 2, *size)

    def attend(self, splits: int) -> Sequence[Call]:
        """Attention in so many pieces."""
        heads, head_dim = self.bench.shape.heads, self.bench.shape.head_dim
        elements = paged_scratch_elements(self.slots, heads, head_dim, splits)
        named: dict[str, Any] = {"out": self.bench.random(self.slots, heads, head_dim), "splits": splits}
        named["scratch"] = torch.empty(elements, device=self.bench.device)
        q = self.qkv[:, :heads]
        return [functools.partial(paged_attention, q, k, v, self.table, self.lengths, **named) for k, v in self.caches]

    def store(self) -> Sequence[Call]:
        """Rotation, and the way of keys and values into their blocks."""
        cos_sin = self.bench.random(self.width * BLOCK, self.bench.shape.head_dim, dtype=torch.float32)
        positions = self.lengths - 1
        given = (self.qkv, cos_sin, positions)
        return [functools.partial(rope_and_store, *given, k, v, self.table) for k, v in self.caches]

    def cases(self) -> Iterator[Case]:
        """All of the above."""
        for splits in SPLITS:
            make = functools.partial(self.attend, splits)
            yield Case("attention", "", self.slots, f"splits {splits}", self.nbytes, make)
        yield Case("store", "", self.slots, "", 2.0 * self.qkv.numel(), self.store)


def measure(case: Case, rate: float) -> dict[str, Any]:
    """Time one case and print its line. rate: bytes per second of the floor."""
    entry: dict[str, Any] = {
        "group": case.group,
        "name": case.name,
        "rows": case.rows,
        "variant": case.variant,
        "nbytes": case.nbytes,
        "floor_us": case.nbytes / rate * 1e6,
    }
    head = f"{case.group:<9} {case.name:<8} {case.rows:>3} rows  {case.variant:<22}"
    try:
        entry["us"] = graph_us(case.make())
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{head} {entry['error']}", flush=True)
        return entry
    us = statistics.median(entry["us"])
    print(f"{head} {us:8.1f} us  {case.nbytes / us / 1e6:5.2f} TB/s  floor {entry['floor_us']:.1f} us", flush=True)
    return entry


def main() -> None:
    """Time every case, print its line, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="thin,lora,dense,attention,store")
    parser.add_argument("--rows", default="1,16,32")
    parser.add_argument("--tilings", action="store_true")
    parser.add_argument("--slots", default="1,64,256")
    parser.add_argument("--length", type=int, default=700)
    parser.add_argument("--bandwidth", type=float)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    shape = Shape(hidden=512, heads=8, key_heads=2, head_dim=64, wide=1024, rank=4) if arguments.tiny else Shape()
    bench = Bench(shape, "cpu" if arguments.tiny else "cuda", arguments.tiny)
    groups, rows = arguments.groups.split(","), [int(n) for n in arguments.rows.split(",")]
    tilings = TILINGS[: 1 if arguments.tiny else None if arguments.tilings else 2]
    slots = [2] if arguments.tiny else [int(n) for n in arguments.slots.split(",")]
    rate = arguments.bandwidth * 1e12 if arguments.bandwidth else copy_rate(1 << 20 if arguments.tiny else 1 << 30)
    print(f"{device_name()}: {rate / 1e12:.2f} TB/s")
    cases = []
    with torch.inference_mode():
        for product in shape.products():
            found = Products(bench, *product).cases(rows, tilings)
            cases += [measure(case, rate) for case in found if case.group in groups]
        for count in slots:
            paged = Paged(bench, count, arguments.length)
            cases += [measure(case, rate) for case in paged.cases() if case.group in groups]
    if arguments.out or not arguments.tiny:
        values = {"bytes_per_s": rate, "length": arguments.length, "cases": cases}
        print(write_results("decode_kernels", device_name(), arguments.out, values))


if __name__ == "__main__":
    main()
