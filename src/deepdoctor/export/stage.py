"""Stage 4: adapter and base -> ``export/adapter`` and ``export/merged``, never in one folder.

Merging is checked by asking: on held-out rows, the merged weights must give the logits of base + adapter to within what
bf16 rounding explains, else the stage fails and leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepdoctor.data.pack import pack
from deepdoctor.data.prompt import EncodedRow, Prompt
from deepdoctor.data.store import PreparedData
from deepdoctor.errors import ParityError
from deepdoctor.export.card import write_card
from deepdoctor.export.merge import merge
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder, PackedAttention
from deepdoctor.model.load import load_decoder
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session

__all__ = ["Parity", "check_parity", "export_model"]

PARITY_ROWS = 2
PARITY_TOKENS = 256
"""First tokens of each row that are compared."""


@dataclass(frozen=True)
class Parity:
    """How far the merged model is from base + adapter, beside what the adapter itself changes.

    Logit differences are root mean squares over all positions and words. allowed: what rounding every merged weight
    once to its dtype, and computing, explain. effect_kept: slope of (merged - base) on (base + adapter - base), 1
    where the adapter acts in full and 0 where it was lost. greedy_agreement: share of positions with the same most
    likely token.
    """

    logit_difference: float
    allowed: float
    adapter_effect: float
    effect_kept: float
    max_difference: float
    greedy_agreement: float
    positions: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the merged model is as close as rounding allows, with the adapter's effect in it.

        The slope is asked only where the effect stands out of the rounding, which alone pulls it down to one half.
        """
        kept = self.adapter_effect < self.allowed / 2 or 0.5 <= self.effect_kept <= 1.5
        return self.logit_difference <= self.allowed and kept


@torch.inference_mode()
def _logits(decoder: Decoder, adapter: Adapter | None, rows: Sequence[EncodedRow]) -> Tensor:
    batch = pack(rows).to(decoder.device)
    prepared = adapter.prepare(decoder) if adapter is not None else None
    attend = PackedAttention(decoder.config.num_kv_heads, batch.row_lengths)
    hidden = decoder(batch.input_ids, batch.positions, attend, prepared)
    return decoder.logits(hidden).float().cpu()


def check_parity(
    reference: Decoder, adapter: Adapter, merged: Decoder, rows: Sequence[EncodedRow], dtype: torch.dtype
) -> Parity:
    """Compare merged weights with base + adapter on the same tokens, both computed in the reference's dtype.

    Rounding to a dtype moves a weight by at most eps / 2 of itself, and moves the logits of L layers by about
    eps / 2 * sqrt(4 L) of their own size, four products a layer adding up independently. Sums of F terms in fp32 add
    their own eps / 2 * sqrt(F) a product, which only shows where everything is fp32. Twice that is allowed.
    """
    rows = [_start(row) for row in rows[:PARITY_ROWS]]
    with_adapter = _logits(reference, adapter, rows)
    alone = _logits(reference, None, rows)
    found = _logits(merged, None, rows)
    spread = float((with_adapter - with_adapter.mean(-1, keepdim=True)).square().mean().sqrt())
    coarsest = max(torch.finfo(dtype).eps, torch.finfo(reference.compute_dtype).eps)
    summing = torch.finfo(torch.float32).eps * reference.config.intermediate_size**0.5
    effect = with_adapter - alone
    slope = float(((found - alone) * effect).sum() / effect.square().sum().clamp_min(1e-30))
    allowed = (coarsest + summing) * (4 * reference.config.num_layers) ** 0.5 * spread
    return Parity(
        logit_difference=float((found - with_adapter).square().mean().sqrt()),
        allowed=allowed,
        adapter_effect=float(effect.square().mean().sqrt()),
        effect_kept=slope,
        max_difference=float((found - with_adapter).abs().max()),
        greedy_agreement=float((found.argmax(-1) == with_adapter.argmax(-1)).float().mean()),
        positions=found.shape[0],
        dtype=str(dtype).removeprefix("torch."),
    )


def _start(row: EncodedRow) -> EncodedRow:
    return EncodedRow(row.input_ids[:PARITY_TOKENS], row.labels[:PARITY_TOKENS], row.reasoning, row.answer)


def export_model(session: Session, data: PreparedData) -> dict[str, Any]:
    """Fill ``export/`` of the run; return what was written.

    ``adapter/``: PEFT files, tokenizer, card. ``merged/``: safetensors, config, generation config, tokenizer, card,
    ``parity.json``.
    Raises ParityError where the merged model does not answer as base + adapter.
    """
    run, recipe, reporter = session.run, session.recipe, session.reporter
    assert run is not None
    template = session.prompt.chat_template
    written: dict[str, Any] = {}
    if recipe.export.adapter:
        if not run.done("export/adapter"):
            with run.stage("export/adapter") as folder:
                session.adapter.save(folder, recipe.model.id, recipe.model.revision)
                session.tokenizer.save(folder, template)
                write_card(folder, "adapter", run.manifest, None)
        written["adapter"] = str(run.path / "export" / "adapter")
    if recipe.export.merged:
        if not run.done("export/merged"):
            with run.stage("export/merged") as folder:
                parity = _write_merged(session, data, folder)
            reporter.say(
                f"export: merged logits within {parity.logit_difference:.4f} of base + adapter (allowed "
                f"{parity.allowed:.4f}; the adapter moves them by {parity.adapter_effect:.2f}, "
                f"{parity.effect_kept:.1%} of that is kept), {parity.greedy_agreement:.1%} greedy agreement"
            )
        written["merged"] = str(run.path / "export" / "merged")
    run.update(export=written)
    return written


def _write_merged(session: Session, data: PreparedData, folder: Path) -> Parity:
    run, reporter = session.run, session.reporter
    assert run is not None
    adapter = Adapter.load(run.path / "train" / "adapter", session.decoder.config)
    with reporter.meter("merge", session.decoder.config.num_layers * 9 + 2, "tensors") as meter:
        dtype = merge(session.source, adapter, folder, meter.advance)
    session.tokenizer.save(folder, session.prompt.chat_template)
    write_json(folder / "generation_config.json", generation_config(session.source, session.prompt))
    rows = [encoded for _, encoded in (data.held_out or data.train)]
    reference, device = session.decoder, session.decoder.device
    held = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[reference.compute_dtype]
    if reference.precision == "nf4":
        # The merge is into the published weights, so that is what it is checked against.
        reference = load_decoder(session.source, "nf4" if _is_4bit(session) else held, device)
    parity = check_parity(reference, adapter.to(device), load_decoder(folder, held, device), rows, dtype)
    if not parity.passed:
        raise ParityError(
            f"the merged model differs from base + adapter: logits by {parity.logit_difference:.4f}, allowed "
            f"{parity.allowed:.4f}; {parity.effect_kept:.1%} of the adapter's effect is in it",
            "nothing was exported; use `export/adapter`, and please report this with the run's manifest.json",
        )
    write_json(folder / "parity.json", {**asdict(parity), "passed": parity.passed})
    write_card(folder, "merged", run.manifest, asdict(parity))
    return parity


def generation_config(source: Path, prompt: Prompt) -> dict[str, Any]:
    """Return generation_config.json of the merged model: the base's sampling advice with this prompt's stop tokens.

    source: folder or .gguf file of the base. A model may have learnt to end with another token than its base.
    """
    tokenizer = prompt.tokenizer
    values: dict[str, Any] = {}
    path = source / "generation_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
    elif tokenizer.temperature is not None:
        values = {"do_sample": True, "temperature": tokenizer.temperature, "top_p": tokenizer.top_p}
    for key in ("_from_model_config", "transformers_version"):
        values.pop(key, None)
    ids = {"eos_token_id": list(prompt.stop_ids), "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    return {**values, **ids}


def _is_4bit(session: Session) -> bool:
    return "quantization_config" in session.decoder.config.raw
