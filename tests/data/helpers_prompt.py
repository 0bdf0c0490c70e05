"""A real Prompt over a byte-level vocabulary without merges: one token a byte, so every length is known."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from deepdoctor.data.prompt import Prompt
from deepdoctor.data.rows import Row
from deepdoctor.model.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"


def byte_tokenizer(*extra: str) -> Tokenizer:
    """Return 256 byte tokens, the special tokens of R1 and ``extra`` added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (BOS, EOS, PAD)])
    names = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", *extra)
    core.add_tokens([AddedToken(text, normalized=False) for text in names])
    return Tokenizer(core, bos=BOS, eos=EOS, pad=PAD)


def byte_prompt(**settings) -> Prompt:
    """Return a Prompt in R1's format unless ``template`` says otherwise."""
    return Prompt(byte_tokenizer(), **settings)


def row(question="What is it?", reasoning="It is this.", answer="This.", index=0) -> Row:
    """Return a row with a place made from its index."""
    return Row(index, f"rows.jsonl:{index + 1}", question, reasoning, answer)


def write_jsonl(path: Path, records) -> str:
    """Write records one a line and return the path as text."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)
