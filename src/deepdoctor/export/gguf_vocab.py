"""A byte-level BPE vocabulary as GGUF metadata: tokens, types, merges, word-splitting rule, template and stop tokens.

llama.cpp knows word-splitting rules by name. The name written is that of the rule which cuts a set of texts exactly as
the tokenizer itself does; where none does, nothing is written.
Source of keys and token types: llama.cpp's converter.
"""

from __future__ import annotations

import json
from typing import Any

from deepdoctor.data.prompt import Prompt
from deepdoctor.errors import UnsupportedModelError
from deepdoctor.model.gguf import WORD_RULES
from deepdoctor.model.tokenizer import Tokenizer

__all__ = ["vocabulary", "word_rule", "writes_bos"]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_NFC = ("qwen2", "deepseek-r1-qwen")
"""Rules of tokenizers that compose characters first."""
_PROBES = (
    "A 45-year-old man's chest pain; Na+ 128 mmol/L, don't SHOULDN'T I'LL 'd we've",
    "  two  spaces,\n\n\ta tab\r\nand a newline \n   \n\n  y ",
    "1234567890 3.14 2026-11-22   7  12 mg  3x\n\n 2026",
    "naïve café 发热 37.8°C — 🩺 ñandú ①②③ Ⅳ ٣٤٥ 'ſ 'ſt",
    "a=b+$5.00 ~|x^2| [x] {y} <z> \\n #hash @at 100% (a)(b)…!?\n.\n",
)


def word_rule(tokenizer: Tokenizer) -> str:
    """Return ``tokenizer.ggml.pre``. Raises UnsupportedModelError where no rule known here cuts text the same way."""
    from tokenizers import Regex, pre_tokenizers

    core = tokenizer.core
    values = json.loads(core.to_str())
    composes = core.normalizer is not None and core.normalizer.normalize_str("e\u0301") == "\u00e9"
    whole_words = bool(values["model"].get("ignore_merges"))
    for name, rules in WORD_RULES.items():
        if composes != (name in _NFC) or whole_words != (name == "llama-bpe") or core.pre_tokenizer is None:
            continue
        splits = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]
        cut = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if all(cut.pre_tokenize_str(text) == core.pre_tokenizer.pre_tokenize_str(text) for text in _PROBES):
            r1 = name == "qwen2" and tokenizer.token_to_id("<｜User｜>") is not None
            return "deepseek-r1-qwen" if r1 else name
    raise UnsupportedModelError(
        f"{tokenizer.place} cuts text into words in a way llama.cpp has no name for here",
        f"GGUF export knows: {', '.join(WORD_RULES)}; export `merged` and convert it with llama.cpp's own script",
    )


def vocabulary(tokenizer: Tokenizer, prompt: Prompt, rows: int) -> dict[str, Any]:
    """Return the ``tokenizer.*`` metadata of a model whose embedding has ``rows`` rows.

    The end token is the one that training wrote, and the template is the one that trained. add_bos_token says whether
    that template starts with BOS: llama.cpp then takes it off the template's text and puts it before the ids.
    Raises UnsupportedModelError as ``word_rule``, and for more tokens than rows.
    """
    values = json.loads(tokenizer.core.to_str())
    texts = {number: text for text, number in tokenizer.core.get_vocab(with_added_tokens=True).items()}
    if max(texts) >= rows:
        raise UnsupportedModelError(f"{tokenizer.place} has token {max(texts)}, the embedding only {rows} rows")
    added = {token["id"]: token for token in values["added_tokens"]}
    tokens, types = [], []
    for number in range(rows):
        text = texts.get(number)
        if text is None:
            kind = UNUSED
        elif number in added:
            kind = CONTROL if added[number]["special"] or _marks_a_role(text) else USER_DEFINED
        else:
            kind = NORMAL
        tokens.append(f"[PAD{number}]" if text is None else text)
        types.append(kind)
    merges = [one if isinstance(one, str) else " ".join(one) for one in values["model"]["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": word_rule(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": prompt.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": writes_bos(prompt),
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": prompt.chat_template,
    }
    if tokenizer.bos_id is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    if others := [id for id in prompt.stop_ids if id != prompt.eos_id]:
        found["tokenizer.ggml.eot_token_id"] = others[0]
    return found


def writes_bos(prompt: Prompt) -> bool:
    """Whether the template puts BOS first as such: not where its first words merely happen to be that token."""
    return prompt.bos_id is not None and "bos_token" in prompt.chat_template


def _marks_a_role(text: str) -> bool:
    """Whether a token that is not marked special is one all the same, such as R1's ``<｜User｜>``."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
