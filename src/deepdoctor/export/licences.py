"""Licences of known bases and data sets, and what they ask of those who pass weights on.

An R1 distill has two: DeepSeek's own, and that of the model it was distilled into. The table was written from
published accounts of these models, not read from their cards on the Hub: check it before you publish. It knows exact
names alone; for any other model the card says so and links to the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EMBEDDED", "Licence", "base_licences", "data_licence", "hub_id", "is_hub_id", "llama_notice"]

EMBEDDED = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the embedded model is on the Hub; ours has the values of its 4-bit file."""


@dataclass(frozen=True)
class Licence:
    """of: model or data set, or what is known of it. id: as in a card's metadata ("mit"), "" where not known."""

    of: str
    id: str

    @property
    def is_llama(self) -> bool:
        """Whether it is a Llama community licence, which asks for a notice and a name."""
        return self.id.startswith("llama")


_LLAMA = {"8b": ("meta-llama/Llama-3.1-8B", "llama3.1"), "70b": ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3")}
_QWEN = {"1.5b": "Qwen2.5-Math-1.5B", "7b": "Qwen2.5-Math-7B", "14b": "Qwen2.5-14B", "32b": "Qwen2.5-32B"}
_R1 = r"(?:deepseek-ai|unsloth)/deepseek-r1-"
_COPY = r"(?:-unsloth)?(?:-bnb-4bit)?"
_LLAMA_NAMES = {"llama3.1": "Llama 3.1", "llama3.2": "Llama 3.2", "llama3.3": "Llama 3.3"}


def base_licences(model: str | None) -> tuple[Licence, ...]:
    """Return the base's own licence, then that of the model under it; the id is "" where it is not known.

    model: Hub id, or None for a local folder.
    """
    if model is None:
        return (Licence("the base model", ""),)
    name = model.lower()
    if found := re.fullmatch(_R1 + r"distill-llama-(8b|70b)" + _COPY, name):
        upstream, licence = _LLAMA[found[1]]
        return Licence(model, "mit"), Licence(upstream, licence)
    if found := re.fullmatch(_R1 + r"distill-qwen-(1\.5b|7b|14b|32b)" + _COPY, name):
        return Licence(model, "mit"), Licence(f"Qwen/{_QWEN[found[1]]}", "apache-2.0")
    if re.fullmatch(_R1 + "0528-qwen3-8b" + _COPY, name):
        return Licence(model, "mit"), Licence("Qwen/Qwen3-8B-Base", "apache-2.0")
    if found := re.fullmatch(r"freedomintelligence/huatuogpt-o1-(8b|70b)", name):
        return Licence(model, "apache-2.0"), Licence(f"meta-llama/Llama-3.1-{found[1].upper()}-Instruct", "llama3.1")
    if re.fullmatch(r"(?:meta-llama|unsloth)/(?:meta-)?llama-3\.1-(?:8b|70b|405b)(?:-instruct)?" + _COPY, name):
        return (Licence(model, "llama3.1"),)
    if re.fullmatch(
        r"huggingfacetb/smollm2-(?:135m|360m|1\.7b)(?:-instruct)?|qwen/qwen3-(?:0\.6|1\.7|4|8|14|32)b(?:-base)?"
        r"|freedomintelligence/huatuogpt-o1-7b",
        name,
    ):
        return (Licence(model, "apache-2.0"),)
    if "llama" in name.replace("_", "-").split("/")[-1].split("-"):
        # Its own card may name a licence and forget the one below it.
        return Licence(model, ""), Licence("a Llama model, by its name", "")
    return (Licence(model, ""),)


def llama_notice(licences: Sequence[Licence]) -> str:
    """The notice that a Llama licence wants beside the weights, "" where none of the licences is one."""
    of = next((licence.id for licence in licences if licence.is_llama), "")
    named = _LLAMA_NAMES.get(of, "Llama")
    return of and (
        f"{named} is licensed under the {named} Community License, Copyright © Meta Platforms, Inc. All Rights "
        "Reserved."
    )


def data_licence(source: str) -> Licence:
    """Return the licence of a data source: a Hub id, ``embedded:rows``, or the name of a file."""
    known = {
        "FreedomIntelligence/medical-o1-reasoning-SFT": "apache-2.0",
        "embedded:rows": "apache-2.0",
    }
    return Licence(source, known.get(source, ""))


def is_hub_id(name: str) -> bool:
    """Whether a model id or data source names something on the Hub rather than a file or folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not Path(name).exists()


def hub_id(model: str) -> str | None:
    """Return the Hub id of a recipe's ``model.id``, or None for a local folder or file."""
    return EMBEDDED.get(model) or (model if is_hub_id(model) else None)
