"""Packed rows through the decoder and answers of the tiny models, in the few lines that several tests need."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdoctor.model.adapter import Adapter, LoraSettings, RowSwitch
from deepdoctor.model.decoder import Decoder, DecoderLayer, PackedAttention
from deepdoctor.model.generate import Generator, Request, Words
from deepdoctor.model.load import load_decoder
from deepdoctor.model.vllm_engine import VllmGenerator
from helpers_models import save_tiny_model

Rows = Sequence[Sequence[int]]
SIDES = ("base", "tuned")


def draw_rows(*lengths: int, vocab: int = 640, seed: int = 0) -> list[list[int]]:
    """Rows of random ids."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=draw).tolist() for n in lengths]


def tiny_pair(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Decoder, Any]:
    """Our decoder of a tiny random model and transformers' model of the same weights."""
    theirs = save_tiny_model(folder, family, **config)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return load_decoder(folder, precision, "cpu"), theirs.to(dtype)


def random_adapter(decoder: Decoder, seed: int = 1, **settings: Any) -> Adapter:
    """An adapter whose B is not zero, so that it matters."""
    adapter = Adapter(decoder.config, LoraSettings(**{"rank": 4, "alpha": 6, **settings}), seed)
    draw = torch.Generator().manual_seed(seed)
    for b in adapter.b.values():
        b.data.normal_(std=0.2, generator=draw)
    return adapter


def hidden_states(decoder: Decoder, rows: Rows, adapter: Adapter | None = None, mask: Tensor | None = None) -> Tensor:
    """Hidden states (T, D) of all rows, packed. mask (T, 1): where the adapter acts."""
    prepared = adapter.prepare(decoder, RowSwitch(mask)) if adapter is not None else None
    ids = torch.tensor([token for row in rows for token in row])
    places = torch.cat([torch.arange(len(row)) for row in rows])
    attend = PackedAttention(decoder.config.num_kv_heads, [len(row) for row in rows])
    return decoder(ids, places, attend, prepared)


def packed_logits(decoder: Decoder, rows: Rows, adapter: Adapter | None = None, mask: Tensor | None = None) -> Tensor:
    """Logits (T, V) of all rows, packed, without gradient."""
    with torch.no_grad():
        return decoder.logits(hidden_states(decoder, rows, adapter, mask))


def their_logits(model: Any, rows: Rows) -> Tensor:
    """The same from a transformers (or PEFT) model, one row at a time."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([list(row)])).logits[0] for row in rows])


def dense_copy(decoder: Decoder) -> Decoder:
    """The same decoder with every quantised matrix replaced by its dense values."""
    dense = copy.deepcopy(decoder)
    for layer in dense.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in layer.linears:
            weight = linear.dense()
            linear.parts, linear.weight = None, weight
    return dense


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Name -> gradient of every trainable matrix, and forget them."""
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    return found


def spelled(ids: Sequence[int]) -> str:
    """One letter pair per token of the tiny models, so that texts can cross token borders."""
    return "".join(f"{chr(97 + token % 26)}{chr(97 + token // 26)}" for token in ids)


WORDS = Words(spelled, close="zz", closing_ids=(5, 6))


def count_tokens(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of every forward pass from now on."""
    run: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, input_ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        run.append(input_ids.shape[0])
        return forward(self, input_ids, *rest, **named)

    patch.setattr(Decoder, "forward", counted)
    return run


def check_cancelling(
    generator: Generator | VllmGenerator, requests: Sequence[Request], expected: dict[object, list[int]]
) -> None:
    """Cancel request 0 at its third token and request 4 while it waits; 1 to 3 answer as expected."""
    heard = 0

    def stop_two(request: Request, token: int) -> None:
        nonlocal heard
        heard += request.key == 0
        if heard == 3:
            generator.cancel(0)
            generator.cancel(4)

    done = list(generator.run(requests, stop_two))
    found = {c.request.key: c for c in done}
    assert len(found) == len(done)
    assert {key for key, c in found.items() if c.cancelled} == {0, 4}
    assert found[0].ids == expected[0][:3] and found[4].ids == []
    assert {n: found[n].ids for n in (1, 2, 3)} == {n: expected[n] for n in (1, 2, 3)}
