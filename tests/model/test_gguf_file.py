"""Broken, cut, damaged and too-new GGUF files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.errors import MissingExtraError, ModelError, UnsupportedModelError
from deepdoctor.model.gguf import read_gguf
from deepdoctor.model.tokenizer import Tokenizer
from helpers_tokenizer import build_r1_tokenizer

pytest.importorskip("gguf")
from helpers_gguf import write_r1_gguf


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny complete llama file with a vocabulary."""
    r1 = Tokenizer.from_folder(build_r1_tokenizer(tmp_path_factory.mktemp("r1")))
    return write_r1_gguf(tmp_path_factory.mktemp("gguf") / "full.gguf", r1)


def test_broken_beginnings_are_named(tmp_path: Path, full: Path) -> None:
    """No file, a folder, an empty file, another format, old and big-endian versions."""
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="there is no GGUF file"):
        read_gguf(path)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        read_gguf(tmp_path)
    whole = full.read_bytes()
    for content, message in (
        (b"", "cannot be read as GGUF"),
        (b"\x80\x02]q\x00" + bytes(40), "expected b'GGUF'"),
        (whole[:4] + b"\x01\0\0\0" + whole[8:], "is version 1; little-endian GGUF of version 2 or 3"),
        (whole[:4] + b"\0\0\0\x03" + whole[8:], "is big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_gguf(path)


def test_an_unknown_tensor_type_is_named(tmp_path: Path, full: Path) -> None:
    """A type newer than the gguf package, or one it cannot dequantise, says which tensor has it."""
    whole = full.read_bytes()
    at = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    path = tmp_path / "m.gguf"
    for number, label in ((99, "number 99"), (15, "Q8_K")):
        path.write_bytes(whole[:at] + bytes([number]) + whole[at + 1 :])
        with pytest.raises(UnsupportedModelError, match=f"blk.0.ffn_up.weight has type {label}"):
            read_gguf(path)


@given(st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_a_cut_file_is_refused(tmp_path_factory: pytest.TempPathFactory, full: Path, cut: int) -> None:
    """Wherever a download stopped, the file is refused before a weight is read."""
    whole = full.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    header = whole.index(b"blk.1.")
    path.write_bytes(whole[: cut % (header if cut % 2 else len(whole) - 32)])
    with pytest.raises(ModelError, match=r"cut off|cannot be read|expected b'GGUF'"):
        read_gguf(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_header_never_escapes(tmp_path_factory: pytest.TempPathFactory, full: Path, data: Any) -> None:
    """Any bytes of the header changed: a readable model or a ModelError, nothing else."""
    content = bytearray(full.read_bytes())
    end = content.index(b"blk.1.")  # past the metadata and into the tensor table
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(4, 1500), st.integers(1500, end), st.integers(end - 600, end)))
        content[at] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 255]))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        model = read_gguf(path)
        assert all(math.prod(t.shape) for _, t in model.tensors())
        model.tokenizer()
    except ModelError:
        pass


def test_values_that_are_no_numbers_are_refused(tmp_path: Path, full: Path) -> None:
    """An infinity among the weights is found when its tensor is read, not as a NaN loss."""
    content = bytearray(full.read_bytes())
    content[-8:-4] = b"\0\0\x80\x7f"
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="has non-finite values"):
        list(read_gguf(path).tensors())


def test_the_missing_package_is_named(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gguf package the install line is given."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError) as caught:
        read_gguf(full)
    assert caught.value.hint == 'pip install "deepdoctor[gguf]"'
