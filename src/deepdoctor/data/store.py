"""``data/`` of a run: encoded rows as safetensors, who is on which side, and the hash of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.data.rows import Row
from deepdoctor.errors import RunError

__all__ = ["PreparedData", "load_prepared", "save_prepared"]

Pairs = list[tuple[Row, EncodedRow]]


@dataclass(frozen=True)
class PreparedData:
    """Rows that passed the check, on their sides; content_hash covers token ids, labels and sides."""

    train: Pairs
    held_out: Pairs
    content_hash: str


def _content_hash(sides: Sequence[Pairs], prompt_fingerprint: str) -> str:
    digest = hashlib.sha256(prompt_fingerprint.encode())
    for number, side in enumerate(sides):
        for _, encoded in side:
            digest.update(json.dumps([number, encoded.input_ids, encoded.labels]).encode())
    return digest.hexdigest()


def save_prepared(folder: Path, train: Pairs, held_out: Pairs, prompt_fingerprint: str) -> PreparedData:
    """Write ``rows.jsonl`` (texts, places and sides) and ``tokens.safetensors``.

    tokens.safetensors holds, for all rows one after another: input_ids and labels int32, and spans (rows, 5) int32 =
    length, reasoning start and end, answer start and end.
    """
    pairs = [("train", pair) for pair in train] + [("held_out", pair) for pair in held_out]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as sink:
        for side, (row, _) in pairs:
            line = {
                "side": side,
                "index": row.index,
                "place": row.place,
                "hash": row.content_hash,
                "question": row.question,
                "reasoning": row.reasoning,
                "answer": row.answer,
            }
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
    encoded = [pair[1] for _, pair in pairs]
    tensors = {
        "input_ids": torch.tensor([t for e in encoded for t in e.input_ids], dtype=torch.int32),
        "labels": torch.tensor([t for e in encoded for t in e.labels], dtype=torch.int32),
        "spans": torch.tensor([[len(e.input_ids), *e.reasoning, *e.answer] for e in encoded], dtype=torch.int32),
    }
    content_hash = _content_hash((train, held_out), prompt_fingerprint)
    save_file(tensors, folder / "tokens.safetensors", metadata={"content_hash": content_hash})
    return PreparedData(train, held_out, content_hash)


def load_prepared(folder: Path, prompt_fingerprint: str) -> PreparedData:
    """Read back what ``save_prepared`` wrote. Raises RunError where it is broken or was encoded with another prompt."""
    try:
        tensors = load_file(folder / "tokens.safetensors")
        lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
        recorded = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["content_hash"]
        sides: dict[str, Pairs] = {"train": [], "held_out": []}
        ids, labels = tensors["input_ids"].tolist(), tensors["labels"].tolist()
        at = 0
        for line, (length, *spans) in zip(lines, tensors["spans"].tolist(), strict=True):
            row = Row(line["index"], line["place"], line["question"], line["reasoning"], line["answer"])
            end = at + length
            encoded = EncodedRow(ids[at:end], labels[at:end], (spans[0], spans[1]), (spans[2], spans[3]))
            sides[line["side"]].append((row, encoded))
            at = end
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder} cannot be read: {error}", "delete this folder and run `deepdoctor data RECIPE`"
        ) from None
    content_hash = _content_hash((sides["train"], sides["held_out"]), prompt_fingerprint)
    if content_hash != recorded:
        raise RunError(
            f"{folder} does not match this recipe's prompt or was changed by hand",
            "delete this folder and run `deepdoctor data RECIPE`",
        )
    return PreparedData(sides["train"], sides["held_out"], content_hash)
