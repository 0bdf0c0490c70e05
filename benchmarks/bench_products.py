"""The products of a training step at the 8B shapes: weights with their adapters, thin products, fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench_shapes import Bench, Call, Item

__all__ = ["bordered", "fp8", "thin"]


def bordered(bench: Bench) -> Iterator[Item]:
    """One product over weight and adapter, beside the weight alone, and weight plus two thin products."""
    t = bench.shape.tokens
    for name, out, inn, blocks in bench.shape.products():
        rank = bench.shape.rank * len(blocks)
        flop, shape = 2.0 * t * out * inn, f"({t}, {inn}) x ({out}, {inn}), R {rank}"
        held = 2 * (t * inn + out * inn + t * out)

        def plain(out: int = out, inn: int = inn, rank: int = 0) -> Call:
            x, w, y = bench.random(t, inn + rank), bench.random(out + rank, inn + rank), bench.random(t, out)
            return lambda: torch.mm(x, w[:out].T, out=y)

        def plain_dx(out: int = out, inn: int = inn, rank: int = 0) -> Call:
            dy, w, dx = bench.random(t, out + rank), bench.random(out + rank, inn + rank), bench.random(t, inn)
            return lambda: torch.mm(dy, w[:, :inn], out=dx)

        def border(out: int = out, inn: int = inn, rank: int = rank) -> Call:
            return plain(out, inn, rank)

        def border_dx(out: int = out, inn: int = inn, rank: int = rank) -> Call:
            return plain_dx(out, inn, rank)

        def with_u(out: int = out, inn: int = inn, rank: int = rank) -> Call:
            x, w, y = bench.random(t, inn + rank), bench.random(out + rank, inn + rank), bench.random(t, out)

            def call() -> None:
                torch.mm(x[:, :inn], w[out:, :inn].T, out=x[:, inn:])
                torch.mm(x, w[:out].T, out=y)

            return call

        def thin(out: int = out, inn: int = inn, rank: int = rank, blocks: list[int] = blocks) -> Call:
            x, w, a, y = bench.random(t, inn), bench.random(out, inn), bench.random(rank, inn), bench.random(t, out)
            bs = [bench.random(width, bench.shape.rank) for width in blocks]

            def call() -> None:
                torch.mm(x, w.T, out=y)
                u = torch.mm(x, a.T)
                for part, b, mine in zip(y.split(blocks, 1), bs, u.split(bench.shape.rank, 1), strict=True):
                    part.addmm_(mine, b.T)

            return call

        def thin_dx(out: int = out, inn: int = inn, rank: int = rank) -> Call:
            dy, w, dx = bench.random(t, out), bench.random(out, inn), bench.random(t, inn)
            a, b = bench.random(rank, inn), bench.random(out, rank)

            def call() -> None:
                torch.mm(dy, w, out=dx)
                dx.addmm_(torch.mm(dy, b), a)

            return call

        for variant, make in (
            ("plain", plain),
            ("bordered", border),
            ("bordered, with u", with_u),
            ("W + thin", thin),
        ):
            yield Item("bordered", f"{name} forward", variant, shape, make, held, flop=flop)
        for variant, make in (("plain", plain_dx), ("bordered", border_dx), ("W + thin", thin_dx)):
            yield Item("bordered", f"{name} dx", variant, shape, make, held, flop=flop)


def thin(bench: Bench) -> Iterator[Item]:
    """The products that are as thin as the adapter's rank."""
    t = bench.shape.tokens
    for name, out, inn, blocks in bench.shape.products():
        rank = bench.shape.rank * len(blocks)

        def u(inn: int = inn, rank: int = rank) -> Call:
            x, a = bench.random(t, inn + rank), bench.random(rank, inn)
            return lambda: torch.mm(x[:, :inn], a.T, out=x[:, inn:])

        def v(out: int = out, rank: int = rank) -> Call:
            dy, b = bench.random(t, out + rank), bench.random(out, rank)
            return lambda: torch.mm(dy[:, :out], b, out=dy[:, out:])

        def grad(width: int, rank: int = rank) -> Call:
            left, right = bench.random(t, rank), bench.random(t, width)
            return lambda: _product(left, right)

        def grad_b(out: int = out, rank: int = rank) -> Call:
            left, right = bench.random(t, out), bench.random(t, rank)
            return lambda: _product(left, right)

        made: list[tuple[str, int, Callable[[], Call]]] = [
            ("u = x A^T", inn, u),
            ("v = dy B", out, v),
            ("dA = v^T x", inn, lambda inn=inn, grad=grad: grad(inn)),  # type: ignore[misc]
            ("dB = dy^T u", out, grad_b),
        ]
        for what, width, make in made:
            nbytes = 2 * t * width
            yield Item("thin", f"{name} {what}", "torch", f"({t}, {width}) R {rank}", make, nbytes, nbytes)


def fp8(bench: Bench) -> Iterator[Item]:
    """Row-wise scaled fp8 products beside bf16."""
    t, e4m3 = bench.shape.tokens, torch.float8_e4m3fn
    for name, out, inn, _ in bench.shape.products():
        for direction, (columns, rows) in {"forward": (inn, out), "dx": (out, inn)}.items():
            flop, held = 2.0 * t * out * inn, t * columns + rows * columns + 2 * t * rows

            def make(columns: int = columns, rows: int = rows, fast: bool = True) -> Call:
                x, w = bench.random(t, columns).to(e4m3), bench.random(rows, columns).to(e4m3)
                left = torch.rand(t, 1, device=bench.device)
                right = torch.rand(1, rows, device=bench.device)
                return lambda: torch._scaled_mm(
                    x, w.T, scale_a=left, scale_b=right, out_dtype=bench.dtype, use_fast_accum=fast
                )

            def slow(make: Callable[..., Call] = make) -> Call:
                return make(fast=False)

            def bf16(columns: int = columns, rows: int = rows) -> Call:
                x, w, y = bench.random(t, columns), bench.random(rows, columns), bench.random(t, rows)
                return lambda: torch.mm(x, w.T, out=y)

            shape = f"({t}, {columns}) x ({rows}, {columns})"
            yield Item("fp8", f"{name} {direction}", "fp8, fast sums", shape, make, held, flop=flop)
            yield Item("fp8", f"{name} {direction}", "fp8, fp32 sums", shape, slow, held, flop=flop)
            yield Item("fp8", f"{name} {direction}", "bf16", shape, bf16, 2 * held, flop=flop)

    def quantise() -> Call:
        x = bench.random(t, bench.shape.hidden)

        def call() -> Tensor:
            scale = x.abs().amax(1, keepdim=True).float().clamp_(min=1e-12).div_(448.0)
            return (x / scale).to(e4m3)

        return call

    nbytes = 3 * t * bench.shape.hidden
    yield Item("fp8", "quantise rows", "torch", f"({t}, {bench.shape.hidden})", quantise, nbytes, nbytes)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, in fp32 on a GPU, as engine/bordered.py takes it."""
    if left.is_cuda:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return torch.mm(left.T, right)
