"""One prompt object for training, asking, comparing, serving and the exported tokenizer.

A template is a Jinja text that renders ``messages`` up to the point where the model writes. The same text is exported
as the tokenizer's chat template, so an endpoint that serves the model asks exactly as training did. The prompt is
encoded on its own in training too, so the training prefix equals the inference prompt token for token by construction.

A row is ``prompt + [<think>\\n] + reasoning + \\n</think> + gap + answer + EOS``; the opening tag is part of the prompt
where the template ends with it (R1, tutorial) and is learnt where it does not (ChatML, Llama 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepdoctor.data.rows import Row
from deepdoctor.errors import DataError, ModelError, UsageError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.tokenizer import Tokenizer

__all__ = ["THINK_CLOSE", "THINK_OPEN", "EncodedRow", "Prompt", "native_template"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_MARKS = {"r1": "<｜User｜>", "chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}
"""A token that only tokenizers of that chat format have."""
_END_OF_TURN = {"r1": None, "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "tutorial": None}
"""What ends an answer; None: the tokenizer's own EOS."""
_SYSTEM_PROBE = "3f1c9a-system-probe"
"""A text no template has, to see whether a system message is rendered."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as tokens. labels: the token itself where it trains, IGNORE_INDEX elsewhere.

    reasoning, answer: (start, end) positions; reasoning includes its tags, answer includes EOS.
    """

    input_ids: list[int]
    labels: list[int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]


def native_template(tokenizer: Tokenizer) -> str:
    """Return the built-in template of the model's own chat format. Raises ModelError where none fits."""
    for name, mark in _MARKS.items():
        if tokenizer.token_to_id(mark) is not None:
            return name
    raise ModelError(
        "the tokenizer has none of the chat formats built in (R1, ChatML, Llama 3)",
        "set data.template to `tutorial` or to the path of a Jinja file",
    )


class Prompt:
    """Renders and encodes prompts and rows for one tokenizer.

    template: "native", "tutorial" or the path of a Jinja file that renders ``messages`` with ``add_generation_prompt``.
    system: system message, or None. train_on: "reasoning_and_answer", "answer" or "all".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "native",
        system: str | None = None,
        train_on: str = "reasoning_and_answer",
    ):
        self.tokenizer = tokenizer
        self.system = system
        self.train_on = train_on
        self.name = native_template(tokenizer) if template == "native" else template
        self.chat_template = _template_text(self.name)
        if "adds_bos" in self.chat_template and not tokenizer.adds_bos:
            # Written into the text, so that the exported tokenizer renders without it too.
            self.chat_template = "{%- set adds_bos = false -%}\n" + self.chat_template
        self._render = _compile(self.chat_template, self.name)
        end = _END_OF_TURN.get(self.name)
        end_id = tokenizer.token_to_id(end) if end else tokenizer.eos_id
        if end_id is None:
            raise ModelError(f"template {self.name} ends answers with {end}, which the tokenizer does not have")
        self.eos_id = end_id
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *tokenizer.stop_ids)))
        probe = self.text("x")
        self.opens_think = probe.rstrip("\n").endswith(THINK_OPEN)
        self.gap = "\n" if self.name == "tutorial" else "\n\n"
        """Between </think> and the answer; the tutorial's template has one line break."""
        first = self.tokenizer.encode(probe)[:1]
        self.bos_id = tokenizer.bos_id if first == [tokenizer.bos_id] else None
        if system is not None and _SYSTEM_PROBE not in self._fill("x", _SYSTEM_PROBE):
            raise UsageError(
                f"data.system is set, but template {self.name} has no place for a system message",
                "leave data.system out, or use a template that renders it",
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of template, system message and mask rule: what an adapter was trained with."""
        joined = "\x1f".join((self.chat_template, self.system or "", self.train_on, self.gap))
        return hashlib.sha256(joined.encode()).hexdigest()

    def text(self, question: str) -> str:
        """Return the prompt as text, up to where the model writes."""
        return self._fill(question.strip(), self.system)

    def _fill(self, question: str, system: str | None) -> str:
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self._render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=self.tokenizer.token(self.tokenizer.bos_id) if self.tokenizer.bos_id is not None else "",
            eos_token=self.tokenizer.token(self.tokenizer.eos_id),
        )

    def prompt_ids(self, question: str) -> list[int]:
        """Return the prompt's token ids: what training, asking, comparing and serving all start from."""
        return self.tokenizer.encode(self.text(question))

    def completion(self, reasoning: str, answer: str) -> tuple[str, int]:
        """Return what the model is to write, without EOS, and the character at which the answer starts."""
        opening = "" if self.opens_think else f"{THINK_OPEN}\n"
        thought = f"{opening}{reasoning.strip()}\n{THINK_CLOSE}{self.gap}"
        return thought + answer.strip(), len(thought)

    def encode_row(self, row: Row) -> EncodedRow:
        """Encode one row with its loss mask. Raises DataError where the prompt itself is empty."""
        prompt = self.prompt_ids(row.question)
        if not prompt:
            raise DataError(f"{row.place}: the prompt has no tokens")
        text, answer_at = self.completion(row.reasoning, row.answer)
        ids, starts = self.tokenizer.encode_with_starts(text)
        input_ids = [*prompt, *ids, self.eos_id]
        begin = len(prompt)
        split = begin + sum(start < answer_at for start in starts)
        end = len(input_ids)
        trained_from = {"all": 0, "reasoning_and_answer": begin, "answer": split}[self.train_on]
        labels = [IGNORE_INDEX] * trained_from + input_ids[trained_from:]
        return EncodedRow(input_ids, labels, (begin, split), (split, end))


def _template_text(name: str) -> str:
    if name in _END_OF_TURN:
        return (files("deepdoctor.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(
            f"data.template {name!r} is neither `native` nor `tutorial` nor a readable file ({reason})",
            "give the path of a Jinja file that renders `messages` up to where the model writes",
        ) from None


def _compile(text: str, name: str) -> Any:
    """Compile in Jinja's sandbox with the whitespace rules transformers uses, so both render alike."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(text)
    except TemplateError as error:
        raise UsageError(f"template {name} is not Jinja: {error}") from None

    def render(**values: Any) -> str:
        try:
            return template.render(**values)
        except Exception as error:  # a template is a program: it can fail in any way
            raise UsageError(
                f"template {name} fails: {error}", "it gets `messages` and `add_generation_prompt`"
            ) from None

    return render
