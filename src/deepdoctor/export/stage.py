"""Stage 4: adapter and base -> ``export/adapter``, ``merged``, ``merged_4bit`` and ``gguf``, never in one folder.

Merging is checked by asking: on held-out rows, the merged weights must give the logits of base + adapter to within what
rounding explains (``parity``), else the stage fails and leaves nothing behind. How far each export is from what was
trained is measured and kept beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from deepdoctor.data.prompt import EncodedRow, Prompt
from deepdoctor.data.store import PreparedData
from deepdoctor.errors import ParityError
from deepdoctor.export.base_choice import Choice, choose_base
from deepdoctor.export.card import write_card
from deepdoctor.export.gguf_stage import gguf_files, write_ggufs
from deepdoctor.export.licences import hub_id
from deepdoctor.export.measure import closeness, logits_of, openings, streamed_logits
from deepdoctor.export.merge import MergedWeights, check_room, merge
from deepdoctor.export.parity import ShakenWeights, compare_logits, first_tokens, shaken_adapter
from deepdoctor.export.reasoning import response_template
from deepdoctor.export.sizes import export_bytes
from deepdoctor.model.adapter import Adapter
from deepdoctor.recipe import Recipe
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session

__all__ = ["export_model", "generation_config"]


def export_model(session: Session, data: PreparedData) -> dict[str, Any]:
    """Fill ``export/`` of the run; return what was written.

    ``adapter/``: PEFT files, tokenizer, card. ``merged/``, ``merged_4bit/``: safetensors, config, generation config,
    tokenizer, card, ``parity.json``. ``gguf/``: .gguf files, Modelfile, card, ``parity.json``.
    Raises ParityError where an export does not answer as base + adapter, RunError where the disk is too small for all.
    """
    run, recipe, reporter = session.run, session.recipe, session.reporter
    assert run is not None
    wanted = {
        "adapter": recipe.export.adapter,
        "merged": recipe.export.merged,
        "merged_4bit": recipe.export.merged_4bit,
        "gguf": bool(recipe.export.gguf) and not _same_ggufs(run.path / "export" / "gguf", recipe),
    }
    todo = [kind for kind, asked in wanted.items() if asked and (kind == "gguf" or not run.done(f"export/{kind}"))]
    if todo:
        _check_disk(session, todo)
    choice = choose_base(session, data) if set(todo) - {"adapter"} else None
    if "adapter" in todo:
        with run.stage("export/adapter") as folder:
            session.adapter.save(folder, hub_id(recipe.model.id) or recipe.model.id, recipe.model.revision)
            _save_tokenizer(session, folder)
            write_card(folder, "adapter", run.manifest, None)
    for kind in ("merged", "merged_4bit"):
        if kind in todo:
            assert choice is not None
            with run.stage(f"export/{kind}") as folder:
                said, kept = _write_merged(session, data, folder, choice, kind == "merged_4bit")
            reporter.say(f"export: {said}", style=None if kept >= 0.5 else "yellow")
    if "gguf" in todo:
        assert choice is not None
        with run.stage("export/gguf") as folder:
            write_ggufs(session, data, folder, choice.held)
    asked = [kind for kind in wanted if getattr(recipe.export, kind)]
    written: dict[str, Any] = {kind: str(run.path / "export" / kind) for kind in asked}
    run.update(export=written)
    return written


def _same_ggufs(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the kinds that are asked for now."""
    return {path.name for path in folder.glob("*.gguf")} == set(gguf_files(recipe.name, recipe.export.gguf).values())


def _check_disk(session: Session, kinds: Sequence[str]) -> None:
    """Raise RunError where the disk cannot hold what is to be written."""
    assert session.run is not None
    needed = export_bytes(session.decoder.config, session.recipe)
    check_room(session.run.path, sum(needed[kind] for kind in kinds), f"export of {' and '.join(kinds)}")


def _save_tokenizer(session: Session, folder: Path) -> None:
    prompt = session.prompt
    session.tokenizer.save(folder, prompt.chat_template, {"response_template": response_template(prompt)})


def _write_merged(
    session: Session, data: PreparedData, folder: Path, choice: Choice, four_bit: bool
) -> tuple[str, float]:
    """Write, check and measure one merged model; return what is to be said of it, and the effect kept."""
    run, reporter = session.run, session.reporter
    assert run is not None
    decoder, device, computed = session.decoder, session.decoder.device, session.decoder.compute_dtype
    adapter = Adapter.load(run.path / "train" / "adapter", decoder.config)
    if four_bit and choice.held is not None:
        # On the steps of NF4 already, they would swallow the adapter when rounded to NF4 again.
        choice = Choice("original")
    with reporter.meter("merge", decoder.config.num_layers * 9 + 2, "tensors") as meter:
        dtype = merge(session.source, adapter, folder, meter.advance, choice.held, four_bit)
    _save_tokenizer(session, folder)
    write_json(folder / "generation_config.json", generation_config(session.source, session.prompt))
    rows = [encoded for _, encoded in (data.held_out or data.train)]
    measured = openings(rows)

    def streamed(weights: MergedWeights, rows: Sequence[EncodedRow], adapter: Adapter | None, trained: bool) -> Tensor:
        try:
            return streamed_logits(weights, rows, computed, device, adapter, trained)
        finally:
            weights.close()

    close = closeness(
        streamed(MergedWeights(folder), measured, None, True),
        logits_of(decoder, session.adapter, measured, trained=True),
        logits_of(decoder, None, measured, trained=True),
    )
    # In 4 bits nothing is as close as rounding to 16 bits: there, only another model is refused.
    parity: dict[str, Any] = {**asdict(close), "dtype": "nf4", "passed": not close.broken}
    said = f"merged_4bit keeps {close.effect_kept:.1%} of what the adapter changes, KL {close.kl:.4f} nats a token"
    if not four_bit:
        start = first_tokens(rows)
        if decoder.precision == "nf4" and choice.into == "original":
            # The merge is into the published weights, so that is what it is checked against.
            sides = (session.adapter, None)
            tuned, alone = (streamed(MergedWeights(session.source), start, one, False) for one in sides)
        else:
            tuned, alone = (logits_of(decoder, one, start) for one in (session.adapter, None))

        def shaken(seed: int) -> Tensor:
            base = MergedWeights(session.source, held=choice.held)
            try:
                weights = ShakenWeights(base, adapter, (dtype, computed), seed)
                moved = shaken_adapter(adapter, computed, seed).to(device).eval()
                return streamed_logits(weights, start, computed, device, moved)
            finally:
                base.close()

        found = streamed(MergedWeights(folder), start, None, False)
        exact = compare_logits(found, tuned, alone, decoder.config, computed, dtype, shaken)
        parity = {**asdict(exact), "passed": exact.passed, "beside_training": asdict(close)}
        said = (
            f"merged logits within {exact.logit_difference:.4f} of base + adapter (allowed {exact.allowed:.4f}; the "
            f"adapter moves them by {exact.adapter_effect:.2f}, {exact.effect_kept:.1%} of that is kept), "
            f"{exact.greedy_agreement:.1%} greedy agreement"
        )
    if not parity["passed"]:
        raise ParityError(
            f"the merged model differs from base + adapter: logits by {parity['logit_difference']:.4f}, allowed "
            f"{parity.get('allowed', close.spread / 2):.4f}; {parity['effect_kept']:.1%} of the adapter's effect is "
            "in it",
            "nothing was exported; use `export/adapter`, and please report this with the run's manifest.json",
        )
    parity["merged_into"] = choice.into
    parity["candidates"] = {name: asdict(one) for name, one in choice.measured.items()}
    write_json(folder / "parity.json", parity)
    write_card(folder, "merged_4bit" if four_bit else "merged", run.manifest, parity)
    return said, close.effect_kept


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
