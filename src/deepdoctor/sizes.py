"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from deepdoctor.errors import UsageError

__all__ = ["CONTEXT_MIB", "MIB", "Size", "parse_size"]

MIB = 2**20
CONTEXT_MIB = 600
"""What a CUDA context and the libraries' own memory take of a card beside PyTorch's."""

_UNITS = {"g": 1024.0, "gib": 1024.0, "gb": 1e9 / MIB, "m": 1.0, "mib": 1.0, "mb": 1e6 / MIB}


def parse_size(text: str, name: str = "--vram") -> float:
    """``15GiB``, ``15G``, ``16384MiB`` -> MiB; a bare number is GiB. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|G|GB|MiB|M|MB)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"{name} is {text!r}, expected a size such as 15GiB")
    return float(match[1]) * _UNITS[(match[2] or "GiB").lower()]


def _checked(text: str) -> str:
    try:
        parse_size(text, "it")
    except UsageError:
        raise ValueError(f"{text!r} is no size; write it as 15GiB") from None
    return text


Size = Annotated[str, AfterValidator(_checked)]
"""A size in a recipe, as text that ``parse_size`` reads."""
