"""The engine beside autograd and float64 on the same packed rows, and plans that make it train on any device."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdoctor.data.pack import MicroBatch, pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.engine.step import Engine, EngineSettings, Rows
from deepdoctor.kernels.flash_attention import Backend, choose_attention, flash_can
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from deepdoctor.kernels.nf4 import quantize_nf4
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import Decoder, DecoderLayer, FrozenLinear, PackedAttention
from deepdoctor.model.load import CONTEXT_MIB, load_decoder
from deepdoctor.recipe import TrainSection
from deepdoctor.train.flat import FlatAdapter
from deepdoctor.train.plan import Plan, make_plan

LORA = LoraSettings(rank=8, alpha=16)
LENGTHS = (40, 1, 130, 23, 64, 17)
"""Rows of one token, of odd sizes, and of more than the 128 tokens of an attention block."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS: tuple[Backend, ...] = ("rows", "efficient", "flash", "fa4")
MID = {"hidden": 2048, "layers": 8, "vocab": 32768, "heads": 16, "key_heads": 4, "wide": 5632}
"""Sizes of a model whose memory is large beside the libraries' own."""


@dataclass(frozen=True)
class Result:
    """Summed loss, and gradients by parameter name; all on the CPU in float64."""

    loss: float
    gradients: dict[str, Tensor]


def rows_of(lengths: Sequence[int], seed: int = 0, vocab: int = 640) -> list[EncodedRow]:
    """Random rows of these lengths; the first third of each carries no label."""
    draw = random.Random(seed)
    made = []
    for length in lengths:
        ids = [draw.randrange(vocab) for _ in range(length)]
        begin = length // 3
        made.append(EncodedRow(ids, [IGNORE_INDEX] * begin + ids[begin:], (begin, begin), (begin, length)))
    return made


def with_adapter(decoder: Decoder, lora: LoraSettings = LORA) -> Adapter:
    """An adapter on the decoder's device whose B is not zero, so that every gradient is there."""
    adapter = Adapter(decoder.config, lora, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(0, 0.05, generator=draw)
    return adapter.to(decoder.device)


def loaded(
    folder: Path,
    precision: str = "fp32",
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    lora: LoraSettings = LORA,
) -> tuple[Decoder, Adapter]:
    """A decoder and such an adapter."""
    decoder = load_decoder(folder, precision, device, compute_dtype)
    return decoder, with_adapter(decoder, lora)


def random_decoder(
    config: ModelConfig, device: str, dtype: torch.dtype = torch.bfloat16, precision: str = "nf4", seed: int = 0
) -> Decoder:
    """A decoder with random weights, made on the device; a fan-in's worth of noise, so that nothing grows."""
    decoder = Decoder(config, dtype, precision)
    draw = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype).mul_(shape[-1] ** -0.5)

    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.input_norm = torch.ones(config.hidden_size, device=device, dtype=dtype)
        layer.post_attention_norm = torch.ones_like(layer.input_norm)
        for linear in layer.linears:
            sides = [(size, linear.in_features) for size in linear.sizes]
            if precision == "nf4":
                linear.parts = tuple(quantize_nf4(noise(*side)) for side in sides)
            else:
                linear.weight = torch.cat([noise(*side) for side in sides])
    decoder.norm = torch.ones(config.hidden_size, device=device, dtype=dtype)
    decoder.embedding = noise(config.vocab_size, config.hidden_size)
    decoder.head = noise(config.vocab_size, config.hidden_size)
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    return decoder.eval()


def sized_config(
    hidden: int, layers: int, vocab: int, heads: int, key_heads: int, wide: int, tied: bool = False
) -> ModelConfig:
    """A Llama's config of these sizes."""
    return ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": tied,
        }
    )


def device_rows(batch: MicroBatch, device: torch.device) -> Rows:
    """The micro-batch as the engine takes it."""
    batch = batch.to(device)
    return Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)


def new_engine(decoder: Decoder, adapter: Adapter, tokens: int, **settings: Any) -> Engine:
    """An engine for micro-batches of ``tokens``: nothing recomputed, one chunk, unless ``settings`` say otherwise.

    rung: one for all layers, or a tuple.
    """
    rung = settings.pop("rung", "keep")
    chosen = {
        "rungs": (rung,) * decoder.config.num_layers if isinstance(rung, str) else rung,
        "max_tokens": tokens,
        "chunk_tokens": tokens,
        "logit_tokens": 64,
        "keep_matrices": True,
        "attention": "rows",
        **settings,
    }
    return Engine(decoder, FlatAdapter(adapter), adapter.settings, EngineSettings(**chosen))


def run_engine(engine: Engine, adapter: Adapter, batch: MicroBatch, scale: float = 1.0) -> Result:
    """One micro-batch, from gradients of zero."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.grad.zero_()
    loss = engine.gradients(device_rows(batch, engine.decoder.device), scale)
    return _result(loss, adapter)


def by_engine(decoder: Decoder, adapter: Adapter, batch: MicroBatch, scale: float = 1.0, **settings: Any) -> Result:
    """One micro-batch by an engine of its own."""
    engine = new_engine(decoder, adapter, sum(batch.row_lengths), **settings)
    found = run_engine(engine, adapter, batch, scale)
    engine.close()
    return found


def by_autograd(decoder: Decoder, adapter: Adapter, batch: MicroBatch, scale: float = 1.0) -> Result:
    """The same through the decoder's modules and PyTorch's backward."""
    adapter.zero_grad(set_to_none=True)
    here = batch.to(decoder.device)
    attend = PackedAttention(decoder.config.num_kv_heads, here.row_lengths)
    hidden = decoder(here.input_ids, here.positions, attend, adapter.prepare(decoder))
    loss = linear_cross_entropy(hidden[here.predict], decoder.head, here.labels).sum()
    (loss * scale).backward()
    return _result(loss, adapter)


def _result(loss: Tensor, adapter: Adapter) -> Result:
    gradients = {name: p.grad.detach().cpu().double() for name, p in adapter.named_parameters()}
    return Result(float(loss.detach()), gradients)


def by_float64(decoder: Decoder, adapter: Adapter, batch: MicroBatch, scale: float = 1.0) -> Result:
    """The same maths in float64, written out once more: what the decoder's own weights and the fp32 masters give."""
    config, here = decoder.config, batch.to(decoder.device)
    leaves = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    angles = here.positions.double()[:, None] * decoder.inverse_frequencies.double()
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] * decoder.rope_factor for f in (torch.cos, torch.sin))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight.double()

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def linear(x: Tensor, frozen: FrozenLinear, layer: int) -> Tensor:
        y = x @ frozen.dense().double().T + (0.0 if frozen.bias is None else frozen.bias.double())
        parts = []
        for name, part in zip(frozen.names, y.split(frozen.sizes, -1), strict=True):
            key = f"{layer}_{name}"
            added = (x @ leaves[f"a.{key}"].T) @ leaves[f"b.{key}"].T if f"a.{key}" in leaves else 0.0
            parts.append(part + adapter.settings.scale * added)
        return torch.cat(parts, -1)

    x = torch.nn.functional.embedding(here.input_ids, decoder.embedding.to(decoder.device)).double()
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        qkv = linear(norm(x, layer.input_norm), layer.qkv, number).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split(layer.heads, 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        heads = _attend(rotate(q), rotate(k), v, here.row_lengths)
        x = x + linear(heads.flatten(1), layer.o, number)
        gate, up = linear(norm(x, layer.post_attention_norm), layer.gate_up, number).chunk(2, -1)
        x = x + linear(torch.nn.functional.silu(gate) * up, layer.down, number)
    logits = norm(x, decoder.norm)[here.predict] @ decoder.head.to(decoder.device).double().T
    loss = torch.nn.functional.cross_entropy(logits, here.labels, reduction="sum")
    (loss * scale).backward()
    return Result(float(loss.detach()), {name: leaf.grad.cpu() for name, leaf in leaves.items()})


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    outs = []
    for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        future = torch.ones(len(query), len(query), dtype=torch.bool, device=q.device).triu(1)
        scores = torch.einsum("tnh,snh->nts", query, key) / math.sqrt(q.shape[-1])
        outs.append(torch.einsum("nts,snh->tnh", scores.masked_fill(future, -math.inf).softmax(-1), value))
    return torch.cat(outs)


def distances(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius error of every tensor; key "all" holds that of all together."""
    assert mine.keys() == theirs.keys()
    errors = {name: float((mine[name] - right).norm()) for name, right in theirs.items()}
    sizes = {name: float(right.norm()) for name, right in theirs.items()}
    found = {name: errors[name] / (sizes[name] + 1e-30) for name in theirs}
    found["all"] = math.hypot(*errors.values()) / math.hypot(*sizes.values())
    assert all(math.isfinite(value) for value in found.values()), "a gradient is not finite"
    return found


def worst(found: Mapping[str, float], count: int = 4) -> str:
    """The largest distances, for a message."""
    named = sorted(found.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value:.2e}" for name, value in named)


def assert_same_bits(mine: Result, theirs: Result, what: str) -> None:
    """Loss and every gradient bit for bit; the message counts what differs and by how much."""
    differ = [name for name, gradient in theirs.gradients.items() if not torch.equal(mine.gradients[name], gradient)]
    if differ or mine.loss != theirs.loss:
        apart = distances(mine.gradients, theirs.gradients)
        pytest.fail(
            f"{what}: {len(differ)} of {len(theirs.gradients)} gradients differ ({worst(apart)}), "
            f"losses {mine.loss!r} and {theirs.loss!r}"
        )


def assert_as_exact(mine: Result, plain: Result, truth: Result, dtype: torch.dtype, what: str) -> None:
    """All gradients together are at most twice as far from float64 as the plain path's in the same dtype.

    Each alone at most three times, for the luck of few numbers, and a quarter of a rounding. The loss: twice, and a
    thirty-second of a rounding.
    """
    unit = torch.finfo(dtype).eps
    ours, others = (distances(found.gradients, truth.gradients) for found in (mine, plain))
    allowed = {name: 3 * other + unit / 4 for name, other in others.items()} | {"all": 2 * others["all"]}
    far = {name: ours[name] for name in ours if ours[name] > allowed[name]}
    assert not far, f"{what}: {worst(far)}; the plain path {worst({name: others[name] for name in far})}"
    error, limit = abs(mine.loss - truth.loss), 2 * abs(plain.loss - truth.loss) + unit / 32 * abs(truth.loss)
    assert error <= limit, f"{what}: loss {mine.loss:.6f}, float64 {truth.loss:.6f}, plain {plain.loss:.6f}"


def skip_unless(backend: Backend, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> None:
    """Skip where this attention backend cannot run."""
    device = torch.device(device)
    if backend == "rows":
        return
    if device.type != "cuda":
        pytest.skip(f"{backend} needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if backend == "fa4":
        if choose_attention(device, dtype, head_dim) != "fa4":
            pytest.skip(f"flash-attn-4 is not installed, or takes no {dtype} with head size {head_dim} on this card")
    elif backend == "flash":
        if not flash_can(device, dtype, head_dim):
            pytest.skip(f"FlashAttention-2 takes no {dtype} here")
    elif torch.cuda.get_device_capability(device) < ((8, 0) if dtype == torch.bfloat16 else (7, 5)):
        pytest.skip(f"memory-efficient attention takes no {dtype} here")


@contextmanager
def plain_attention(device: torch.device | str) -> Iterator[None]:
    """Let the backend "rows" compute with the one form of PyTorch's attention whose backward repeats its bits."""
    kernel = nullcontext()
    if torch.device(device).type == "cuda":
        kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel:
        yield


def engine_plan(
    decoder: Decoder, section: TrainSection, rows: Sequence[EncodedRow], room_mib: float = 8192.0, **settings: Any
) -> Plan:
    """The plan by which the engine trains, on a CPU too, with ``room_mib`` for what PyTorch allocates."""
    on_gpu = decoder.device.type == "cuda"
    backend = choose_attention(decoder.device, decoder.compute_dtype, decoder.config.head_dim) if on_gpu else "rows"
    options = {"seed": 7, "attention": backend, **settings}
    return make_plan(
        decoder.config,
        section,
        [len(row.input_ids) for row in rows],
        device=torch.device("cuda"),
        precision=decoder.precision,
        compute_dtype=decoder.compute_dtype,
        memory_mib=room_mib + CONTEXT_MIB,
        **options,
    )


def packed(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> MicroBatch:
    """Rows of these lengths as one micro-batch."""
    return pack(rows_of(lengths, seed))


def mid_rows(count: int = 24) -> list[EncodedRow]:
    """Rows of 300 to 1,100 tokens."""
    return rows_of([300 + 97 * number % 800 for number in range(count)], vocab=MID["vocab"])


def empty_gpu() -> int:
    """Give every unused block of GPU memory back; returns the bytes that something still holds."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
