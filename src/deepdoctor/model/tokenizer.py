"""Text to token ids and back, from a model folder's own ``tokenizer.json``.

The file is read by the ``tokenizers`` library directly. transformers 5.17 to 5.21 pick the wrong class for a local copy
of R1-Distill-Llama and drop every space; the file itself is right. Whatever the source, a tokenizer is only accepted
when text comes back as it went in, piece by piece, because prompts and answers are tokenized apart and joined as ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from deepdoctor.errors import DataError, ModelError

__all__ = ["StreamDecoder", "Tokenizer"]

# Tokens that published vocabularies set aside and never train, tried in this order where pad is missing or is eos.
# The last four are what R1-Distill-Qwen has, whose <|endoftext|> became its eos.
_PAD_TOKENS = (
    "<｜▁pad▁｜>",
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<unk>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|EOT|>",
)
_SAMPLES = (
    "A 45-year-old man has chest pain; Na+ 128 mmol/L.",
    "  two  spaces,\n\n\ta tab\r\nand a newline \n",
    "1234567890 3.14 2026-11-22   7",
    "naïve café 发热 37.8 °C — 🩺 ñandú",
    "Don't SHOUT [x] {y} <z> \\n",
)
_AGAIN = "download the model's tokenizer files again, from its publisher"


def _byte_alphabet() -> dict[str, int]:
    """Map each character of the byte-level alphabet to its byte. Source: GPT-2's encoder (256 printable stand-ins)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE vocabulary with its special tokens, chat template and the authors' sampling advice.

    core             the library's own object, for what this class does not offer
    bos_id           begin-of-sequence id, or None; never added by ``encode``
    eos_id           end-of-sequence id
    pad_id           padding id, never equal to eos_id, so that a learnt eos is never masked as padding
    stop_ids         eos_id, then every other eos id of generation_config.json
    vocab_size       1 + the largest id; the model's embedding may have more rows
    special_tokens   texts that ``encode`` turns into one id wherever they stand (every added token)
    chat_template    Jinja text, or None
    temperature      from generation_config.json where do_sample is true (its own default is 1), else None
    top_p            likewise
    model_max_length tokens the configuration names, or None
    adds_bos         whether the model's authors put bos before plain text
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos: str,
        bos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        generation: Mapping[str, Any] | None = None,
        model_max_length: int | None = None,
        place: str = "tokenizer",
    ):
        """Check and wrap ``core``, which is changed: truncation, padding and added bos/eos are switched off.

        eos, bos, pad: token texts. generation: contents of generation_config.json. place: named in errors.
        Raises ModelError for an eos or bos that is not in the vocabulary, no usable pad, a vocabulary that is not
        byte-level, or text that does not come back as it went in.
        """
        self.place = place
        self.core = core
        core.no_truncation()
        core.no_padding()
        self.adds_bos = bos is not None and core.encode("a").ids[:1] == [core.token_to_id(bos)]
        # A post-processor can only add tokens (which this class leaves to its caller) or trim offsets (unused here).
        core.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
        self.special_tokens = frozenset(t.content for t in core.get_added_tokens_decoder().values())
        self.vocab_size = 1 + max(core.get_vocab().values(), default=-1)
        self.eos_id = self._known(eos, "eos_token")
        self.bos_id = None if bos is None else self._known(bos, "bos_token")
        self.pad_id = self._choose_pad(pad)
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        generation = dict(generation or {})
        sampled = bool(generation.get("do_sample"))
        self.temperature = float(generation.get("temperature") or 1.0) if sampled else None
        self.top_p = float(generation.get("top_p") or 1.0) if sampled else None
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *_eos_ids(generation, place))))
        self._check_lossless()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and what there is of tokenizer, special token and generation config and template file.

        path: a model folder. Some file of it has to name the eos token.
        Raises ModelError naming the file and the remedy.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            has = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
            old = (folder / "tokenizer.model").is_file()
            raise ModelError(
                f"{folder} has no tokenizer.json (it has: {has or 'nothing'})",
                "a SentencePiece tokenizer.model alone is not supported" if old else _AGAIN,
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for anything it cannot parse
            raise ModelError(f"{file} cannot be read as a tokenizer: {error}", _AGAIN) from None
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
        generation = _read_json(folder / "generation_config.json")
        eos = _token_text(named, "eos_token", folder)
        if eos is None:
            ids = _eos_ids(generation, str(folder))
            eos = core.id_to_token(ids[0]) if ids else None
        if eos is None:
            raise ModelError(
                f"{folder} names no eos token: no eos_token in tokenizer_config.json or special_tokens_map.json, no "
                "eos_token_id in generation_config.json",
                _AGAIN,
            )
        longest = config.get("model_max_length")
        return cls(
            core,
            eos=eos,
            bos=_token_text(named, "bos_token", folder),
            pad=_token_text(named, "pad_token", folder),
            chat_template=_chat_template(folder, config),
            generation=generation,
            # transformers writes 1e30 where a model names no limit
            model_max_length=int(longest) if isinstance(longest, int | float) and 0 < longest < 1e12 else None,
            place=str(folder),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. Special token texts become their single id; no bos or eos is added.

        Raises DataError for text that is not Unicode.
        """
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except TypeError:
            lone = next((n for n, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if lone is None:
                raise
            raise DataError(
                f"a text cannot be tokenized: character {lone} is half of a surrogate pair, {text[lone : lone + 1]!a}",
                "write the file again as UTF-8; its \\u escapes are broken",
            ) from None

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``text`` and the character of it at which each begins."""
        encoding = self.core.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        skip_special: leave out tokens marked special (bos, eos, pad, ...). ``<think>`` and its like are not so marked.
        """
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def token_to_id(self, text: str) -> int | None:
        """Return the id of the token spelled ``text`` in the vocabulary, or None."""
        return self.core.token_to_id(text)

    def token(self, id: int) -> str:
        """Return the token's spelling (``Ġpain`` for " pain"). Raises ModelError for an id outside the vocabulary."""
        text = self.core.id_to_token(id) if id >= 0 else None
        if text is None:
            raise ModelError(f"{self.place} has no token {id}; ids run from 0 to {self.vocab_size - 1}")
        return text

    def token_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes, possibly part of a character, that the token stands for; none for an unknown id."""
        text = self.core.id_to_token(id)
        if text is None:
            return b""
        try:
            return bytes([_BYTES[c] for c in text])
        except KeyError:
            return text.encode()

    def save(self, folder: str | Path, chat_template: str | None, extra: Mapping[str, Any] | None = None) -> None:
        """Write the tokenizer so that transformers 4 and 5 load it with the same ids, template and pad.

        folder: made if missing. chat_template: Jinja text to ship. extra: further tokenizer_config.json entries.
        Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and, as newer readers prefer it,
        chat_template.jinja. Encoding adds no bos, since the template writes it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"eos_token": self.token(self.eos_id), "pad_token": self.token(self.pad_id)}
        if self.bos_id is not None:
            named = {"bos_token": self.token(self.bos_id), **named}
        config: dict[str, Any] = {
            # The name transformers 5 gives itself, TokenizersBackend, is unknown to transformers 4; this one both know.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        template = folder / "chat_template.jinja"
        template.unlink(missing_ok=True)
        if chat_template is not None:
            config["chat_template"] = chat_template
            template.write_text(chat_template, encoding="utf-8", newline="")
        self.core.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", {**config, **(extra or {})})
        _write_json(folder / "special_tokens_map.json", named)

    def _known(self, text: str, role: str) -> int:
        found = self.core.token_to_id(text)
        if found is None:
            raise ModelError(
                f"{self.place}: {role} {text!r} is not in the vocabulary of {self.vocab_size} tokens", _AGAIN
            )
        return found

    def _choose_pad(self, configured: str | None) -> int:
        for text in (configured, *_PAD_TOKENS):
            found = None if text is None else self.core.token_to_id(text)
            if found is not None and found != self.eos_id:
                return found
        raise ModelError(
            f"{self.place}: pad_token is {configured!r} and no other token can serve; padding must differ from the eos "
            f"token {self.token(self.eos_id)!r}, or the model never learns to stop",
            f"set pad_token in tokenizer_config.json to an unused token; tried: {', '.join(_PAD_TOKENS)}",
        )

    def _check_lossless(self) -> None:
        eos = self.token(self.eos_id)
        whole = [(s, self.encode(s)) for s in (*_SAMPLES, f" a {eos} b\n{eos}{eos}c")]
        joined = "".join(_SAMPLES), [i for s in _SAMPLES for i in self.encode(s)]
        for text, ids in (*whole, joined):
            back = self.decode(ids)
            if back != text or any(not 0 <= i < self.vocab_size for i in ids):
                raise ModelError(
                    f"{self.place} loses text: {text!r} comes back as {back!r}",
                    "use the tokenizer.json its publisher ships; copies saved by transformers before 5.22 may lack "
                    "the spaces, and SentencePiece vocabularies that put a space before each piece are not supported",
                )
        if type(self.core.decoder).__name__ != "ByteLevel":
            raise ModelError(
                f"{self.place}: decoder {type(self.core.decoder).__name__} is not supported, only ByteLevel",
                "byte-level BPE is what Llama 3, Qwen 2/3, SmolLM2 and the R1 distills use",
            )


class StreamDecoder:
    """Turns ids into text as they come, whole characters only, in time proportional to the token.

    The pieces joined equal ``tokenizer.decode`` of all ids. skip_special: leave out tokens marked special.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        added = tokenizer.core.get_added_tokens_decoder() if skip_special else {}
        self._skip = frozenset(i for i, token in added.items() if token.special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take one id; return the characters it completes, possibly none."""
        return "" if id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """Return what an unfinished character becomes (U+FFFD), or nothing, and start afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, empty where there is no such file. Raises ModelError where it is broken."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", _AGAIN) from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(values).__name__}", _AGAIN)
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_text(named: Mapping[str, Any], role: str, folder: Path) -> str | None:
    value = named.get(role)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{folder}: {role} is {value!r}, expected a token's text", _AGAIN)
    return value


def _eos_ids(generation: Mapping[str, Any], place: str) -> list[int]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ModelError(
            f"{place}: eos_token_id in generation_config.json is {value!r}, expected an id or a list of ids"
        )
    return ids


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template file wins over the config's entry, as in transformers; of several named ones, ``default``."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelError(
            f"{folder}: chat_template in tokenizer_config.json is {type(value).__name__}, expected text", _AGAIN
        )
    return value
