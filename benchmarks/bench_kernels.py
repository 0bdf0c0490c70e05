"""Every operation of a training step at the shapes of an 8B Llama: time, and share of what the card allows.

    python benchmarks/bench_kernels.py [--tokens 6144] [--groups norm,rope,...] [--quick] [--tiny] [--out FILE]

Per operation: median microseconds (20th and 80th percentile in the file) by CUDA events over inputs that take turns, so
that they come from memory and not from the L2 cache. For operations that move bytes, the share of the measured copy
bandwidth that the fewest bytes (each input read once, each output written once) would need; for products, TFLOP/s.
``torch`` is the plain PyTorch reference, ``triton`` the kernel.

Groups
norm rope swiglu nf4 loss        the public operations, reference and kernel
bordered   y = [x, u] [W, B]^T in one product, beside plain x W^T, and beside W and two thin products; forward and dx
thin       u = x A^T, v = dy B, dA = v^T x, dB = dy^T u
fp8        row-wise scaled products, and what quantising their rows costs
attention  forward and backward over packed rows, each backend of kernels/flash_attention.py

TFLOP/s of bordered and thin variants count the frozen product alone, so that they compare. An operation that fails
leaves its error, and the rest goes on; each group runs in a process of its own. Adds to
benchmarks/results/kernels_<gpu>_<date>.json. --tiny: on a CPU, small.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_common import (
    copy_rate,
    device_name,
    matmul_rate,
    merge_results,
    result_path,
    sample_us,
    spread,
    write_results,
)
from bench_products import bordered, fp8, thin
from bench_shapes import Bench, Call, Item, Shape

ROW_LENGTHS = (671, 878, 540, 620, 1048, 740, 700, 947)
"""Eight rows of medical-o1 length, 6,144 tokens."""
ROTATE_BYTES = 400 << 20
"""Inputs that take turns are at least this many bytes together: eight times the L2 cache of an H100."""


def norm(bench: Bench) -> Iterator[Item]:
    """RMS norm: forward with the residual, backward, recompute."""
    from deepdoctor.kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward

    t, d = bench.shape.tokens, bench.shape.hidden
    row, shape = 2 * t * d, f"({t}, {d})"
    for impl in bench.impls():

        def forward(impl: str = impl) -> Call:
            x, delta, w, out = bench.random(t, d), bench.random(t, d), bench.random(d), bench.random(t, d)
            return lambda: add_rms_norm(x, delta, w, 1e-5, out=out, impl=impl)

        def backward(impl: str = impl) -> Call:
            x, dy, w, add = bench.random(t, d), bench.random(t, d), bench.random(d), bench.random(t, d)
            rstd = torch.rand(t, device=bench.device)
            return lambda: rms_norm_backward(dy, x, rstd, w, add=add, out=add, impl=impl)

        def again(impl: str = impl) -> Call:
            x, w, out, rstd = (
                bench.random(t, d),
                bench.random(d),
                bench.random(t, d),
                torch.rand(t, device=bench.device),
            )
            return lambda: normalise(x, rstd, w, out=out, impl=impl)

        yield Item("norm", "add_rms_norm", impl, shape, forward, 3 * row, 4 * row)
        yield Item("norm", "rms_norm_backward", impl, shape, backward, 3 * row, 4 * row)
        yield Item("norm", "normalise", impl, shape, again, 2 * row, 2 * row)


def rope(bench: Bench) -> Iterator[Item]:
    """Rotary positions, in place and back."""
    from deepdoctor.kernels.rope import rope_backward, rope_qkv_

    s = bench.shape
    t, h, heads = s.tokens, s.head_dim, s.heads + 2 * s.key_heads
    rotated = s.heads + s.key_heads
    head = 2 * t * h
    for impl in bench.impls():

        def forward(impl: str = impl) -> Call:
            qkv, cos, sin = bench.random(t, heads, h), *bench.tables()
            return lambda: rope_qkv_(qkv, cos, sin, rotated, impl=impl)

        def backward(impl: str = impl) -> Call:
            dq, dk, dv = (bench.random(t, n, h) for n in (s.heads, s.key_heads, s.key_heads))
            out, (cos, sin) = bench.random(t, s.qkv + 3 * s.rank), bench.tables()
            return lambda: rope_backward(dq, dk, dv, cos, sin, out=out, impl=impl)

        yield Item("rope", "rope_qkv_", impl, f"({t}, {heads}, {h})", forward, heads * head, 2 * rotated * head)
        yield Item("rope", "rope_backward", impl, f"({t}, {heads}, {h})", backward, 2 * heads * head, 2 * heads * head)


def swiglu(bench: Bench) -> Iterator[Item]:
    """SwiGLU, forward and backward."""
    from deepdoctor.kernels.swiglu import swiglu_backward_, swiglu_forward

    t, f = bench.shape.tokens, bench.shape.wide
    row, shape = 2 * t * f, f"({t}, 2 x {f})"
    for impl in bench.impls():

        def forward(impl: str = impl) -> Call:
            gate_up, out = bench.random(t, 2 * f), bench.random(t, f)
            return lambda: swiglu_forward(gate_up, out=out, impl=impl)

        def backward(impl: str = impl, again: bool = False) -> Call:
            gate_up, d_act = bench.random(t, 2 * f), bench.random(t, f)
            act = torch.empty_like(d_act) if again else None
            return lambda: swiglu_backward_(gate_up, d_act, act=act, impl=impl)

        def backward_again(impl: str = impl) -> Call:
            return backward(impl, True)

        yield Item("swiglu", "swiglu_forward", impl, shape, forward, 3 * row, 3 * row)
        yield Item("swiglu", "swiglu_backward_", impl, shape, backward, 3 * row, 5 * row)
        yield Item("swiglu", "swiglu_backward_, act again", impl, shape, backward_again, 4 * row, 6 * row)


def nf4(bench: Bench) -> Iterator[Item]:
    """NF4, read and written, at the largest and a square weight."""
    from deepdoctor.kernels.nf4 import dequantize_nf4, quantize_nf4

    for columns, rows in ((bench.shape.hidden, 2 * bench.shape.wide), (bench.shape.hidden, bench.shape.hidden)):
        count = rows * columns
        packed = count // 2 + count // 64
        for impl in bench.impls():

            def forward(impl: str = impl, rows: int = rows, columns: int = columns) -> Call:
                weight = quantize_nf4(bench.random(rows, columns), impl=impl)
                out = torch.empty(rows, columns + 32, dtype=bench.dtype, device=bench.device)[:, :columns]
                return lambda: dequantize_nf4(weight, bench.dtype, out=out, impl=impl)

            def backward(impl: str = impl, rows: int = rows, columns: int = columns) -> Call:
                weight = bench.random(rows, columns)
                return lambda: quantize_nf4(weight, impl=impl)

            shape = f"({rows}, {columns})"
            yield Item("nf4", "dequantize_nf4", impl, shape, forward, packed + 2 * count, packed + 2 * count)
            yield Item("nf4", "quantize_nf4", impl, shape, backward, packed + 2 * count, packed + 2 * count)


def loss(bench: Bench) -> Iterator[Item]:
    """Loss of rows of logits, and from hidden states, cut by tokens and by vocabulary."""
    from deepdoctor.kernels.linear_cross_entropy import (
        cross_entropy_,
        linear_cross_entropy_backward_chunks,
        linear_cross_entropy_by_vocabulary,
    )

    s = bench.shape
    chunk, t = min(1024, s.tokens), s.tokens
    nbytes = 2 * chunk * s.vocab

    def labels(count: int) -> Tensor:
        return torch.randint(0, s.vocab, (count,), device=bench.device)

    for impl in bench.impls():

        def entropy(impl: str = impl) -> Call:
            logits, wanted = bench.random(chunk, s.vocab), labels(chunk)
            losses = torch.empty(chunk, device=bench.device)
            return lambda: cross_entropy_(logits, wanted, losses, impl=impl)

        def chunks(impl: str = impl, size: int = chunk) -> Call:
            h, weight, wanted = bench.random(t, s.hidden), bench.random(s.vocab, s.hidden) * 0.02, labels(t)
            return lambda: linear_cross_entropy_backward_chunks(
                h, weight, wanted, scale=1e-3, chunk_tokens=size, impl=impl
            )

        def parts(impl: str = impl) -> Call:
            h, weight, wanted = bench.random(t, s.hidden), bench.random(s.vocab, s.hidden) * 0.02, labels(t)
            pieces = [lambda piece=piece: piece for piece in weight.split(16384)]
            return lambda: linear_cross_entropy_by_vocabulary(h, pieces, wanted, scale=1e-3, impl=impl)

        product = 2.0 * t * s.vocab * s.hidden
        head = 2 * s.vocab * s.hidden
        yield Item("loss", "cross_entropy_", impl, f"({chunk}, {s.vocab})", entropy, nbytes, 2 * nbytes)
        for size in (chunk, 2 * chunk):
            made = lambda impl=impl, size=size: chunks(impl, size)  # noqa: E731
            name = f"linear_cross_entropy, chunks of {size}"
            yield Item("loss", name, impl, f"({t}, {s.hidden})", made, head, flop=2 * product)
        yield Item(
            "loss", "linear_cross_entropy by vocabulary", impl, f"({t}, {s.hidden})", parts, head, flop=3 * product
        )


def attention(bench: Bench) -> Iterator[Item]:
    """Each backend, rows of the usual length packed and one long row."""
    from deepdoctor.kernels.flash_attention import PackedRows, attention_backward, attention_forward

    s = bench.shape
    heads = s.heads + 2 * s.key_heads
    whole, rest = divmod(s.tokens, sum(ROW_LENGTHS))
    packed = [*(ROW_LENGTHS * whole), *([rest] if rest else [])]
    for name, lengths in (("packed rows", packed), ("one row", [16384 if bench.device == "cuda" else 256])):
        if bench.quick and name == "one row":
            continue
        tokens = sum(lengths)
        flop = 2.0 * s.heads * s.head_dim * sum(length**2 for length in lengths)  # two products, half of each
        for backend in ("fa4", "flash", "efficient", "rows"):

            def forward(backend: str = backend, lengths: list[int] = lengths, tokens: int = tokens) -> Call:
                qkv = bench.random(tokens, heads, s.head_dim)
                rows = PackedRows.of(lengths, bench.device)
                out = bench.random(tokens, s.heads, s.head_dim)
                return lambda: attention_forward(qkv, s.key_heads, rows, backend=backend, out=out)

            def backward(backend: str = backend, lengths: list[int] = lengths, tokens: int = tokens) -> Call:
                qkv, d_out = bench.random(tokens, heads, s.head_dim), bench.random(tokens, s.heads, s.head_dim)
                rows = PackedRows.of(lengths, bench.device)
                out, saved = attention_forward(qkv, s.key_heads, rows, backend=backend)
                return lambda: attention_backward(d_out, qkv, out, saved, s.key_heads, rows, backend=backend)

            held = 2 * tokens * (heads + s.heads) * s.head_dim
            shape = f"{len(lengths)} rows, {tokens} tokens"
            yield Item("attention", f"forward, {name}", backend, shape, forward, held, flop=flop)
            yield Item("attention", f"backward, {name}", backend, shape, backward, 2 * held, flop=2.5 * flop)


GROUPS: dict[str, Callable[[Bench], Iterator[Item]]] = {
    "norm": norm,
    "rope": rope,
    "swiglu": swiglu,
    "nf4": nf4,
    "loss": loss,
    "bordered": bordered,
    "thin": thin,
    "fp8": fp8,
    "attention": attention,
}


def measure(item: Item, repeats: int, copy: float) -> dict[str, Any]:
    """Time one item; an error becomes part of the entry."""
    entry = {"group": item.group, "name": item.name, "impl": item.variant, "shape": item.shape, "dtype": "bf16"}
    sets = max(1, min(8, -(-ROTATE_BYTES // item.held))) if torch.cuda.is_available() else 1
    try:
        samples = sample_us([item.make() for _ in range(sets)], repeats)
    except Exception as error:  # whatever a kernel does wrong belongs in the table
        return {**entry, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    entry |= {"us": spread(samples)[1], "us_p20_p50_p80": spread(samples), "sets": sets, "samples": len(samples)}
    if item.nbytes:
        floor = item.nbytes / copy * 1e6
        entry |= {"bytes": item.nbytes, "floor_us": floor, "share_of_copy": floor / entry["us"]}
    if item.flop:
        entry["tflops"] = item.flop / entry["us"] / 1e6
    return entry


def line(entry: dict[str, Any]) -> str:
    """One result as text."""
    head = f"{entry['name']:<38} {entry['impl']:<17} {entry['shape']:<42}"
    if "error" in entry:
        return f"{head} failed: {entry['error'][:120]}"
    share = f"{entry['share_of_copy']:7.0%} of copy" if "share_of_copy" in entry else ""
    rate = f"{entry['tflops']:7.1f} TFLOP/s" if "tflops" in entry else ""
    return f"{head} {entry['us']:10.1f} us {share}{rate}"


def main() -> None:
    """Parse, and measure group by group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="10 calls of each instead of 50, no 16,384-token row")
    parser.add_argument("--tiny", action="store_true", help="narrow shapes, for a trial on a CPU")
    parser.add_argument("--out", help="result file")
    arguments = parser.parse_args()
    groups = arguments.groups.split(",")
    if not set(groups) <= set(GROUPS):
        parser.error(f"groups are {', '.join(GROUPS)}")
    path = Path(arguments.out or result_path("kernels", device_name()))
    if len(groups) == 1:
        return measure_group(groups[0], arguments, path)
    # In processes of their own: after an illegal access every later call of a process fails.
    options = [f"--{name}" for name in ("quick", "tiny") if getattr(arguments, name)]
    options += ["--tokens", str(arguments.tokens), "--out", str(path)]
    for group in groups:
        subprocess.run([sys.executable, __file__, "--groups", group, *options], check=False)
    print(path)


def measure_group(group: str, arguments: argparse.Namespace, path: Path) -> None:
    """Measure the items of one group, print each and add them to the file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(256, 64, 4, 2, 16, 192, 1000, 4) if arguments.tiny else Shape(arguments.tokens)
    torch.manual_seed(0)
    bench = Bench(shape, device, arguments.quick)
    gpu = device_name()
    copy = copy_rate(1 << 30 if device == "cuda" else 1 << 24)
    matmul = matmul_rate(8192 if device == "cuda" else 256)
    print(f"{group} on {gpu}: copy {copy / 1e12:.2f} TB/s, bf16 product {matmul / 1e12:.1f} TFLOP/s", flush=True)
    cases: list[dict[str, Any]] = []
    try:
        for item in GROUPS[group](bench):
            cases.append(measure(item, 10 if arguments.quick else 50, copy))
            print(line(cases[-1]), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:  # the group itself, or a card that answers no more; what was measured is kept
        cases.append({"group": group, "name": group, "impl": "", "shape": "", "error": f"{error!r:.300}"})
        print(line(cases[-1]), flush=True)
    merged = merge_results(path, gpu, cases, ("group", "name", "impl", "shape"))
    machine = {"copy_bytes_per_s": copy, "matmul_tflops": matmul / 1e12, "shape": asdict(shape)}
    write_results("kernels", gpu, str(path), {**machine, "cases": merged})


if __name__ == "__main__":
    main()
