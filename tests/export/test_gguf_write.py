"""GGUF files: what is written is what was merged, in llama.cpp's names and order, and llama.cpp cuts text as we do."""

import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from deepdoctor.data.prompt import Prompt
from deepdoctor.errors import MissingExtraError, UnsupportedModelError
from deepdoctor.export.gguf_stage import as_row, logprobs_apart
from deepdoctor.export.gguf_vocab import vocabulary, word_rule
from deepdoctor.export.gguf_write import GGUF_KINDS, gguf_bytes, write_gguf
from deepdoctor.export.llamacpp import has_llamacpp, llamacpp_answers
from deepdoctor.export.measure import GGUFWeights, streamed_logits
from deepdoctor.export.merge import MergedWeights
from deepdoctor.model.gguf import read_gguf
from deepdoctor.model.load import load_tokenizer, open_weights
from helpers_gguf import write_gguf as write_as_converter
from helpers_models import ROPES, save_tiny_model
from helpers_tokenizer import build_r1_tokenizer
from helpers_train import synthetic_rows

LLAMA3 = {**ROPES["llama3"], "original_max_position_embeddings": 8192}
FAMILIES = {
    "llama": ("llama", {}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "llama tied with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}
QUESTION = "What is it?  12 mg <think> é"


@pytest.fixture
def written(tmp_path):
    """A function: family and kind -> the tiny model's folder, its prompt and its GGUF file."""

    def write(family: str, kind: str, template: str = "native"):
        architecture, settings = FAMILIES[family]
        folder = tmp_path / "base"
        if not folder.exists():
            build_r1_tokenizer(folder)
            save_tiny_model(folder, architecture, **settings)
        prompt, file = Prompt(load_tokenizer(folder), template), tmp_path / f"{kind}.gguf"
        weights = MergedWeights(folder)
        write_gguf(file, weights, prompt, kind, "tiny")
        assert file.stat().st_size <= gguf_bytes(weights.config, kind)
        weights.close()
        return folder, prompt, file

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_back_is_what_was_there(written, family):
    """Every tensor of an f16 file is the base's, rounded to fp16, and config and logits come back."""
    folder, _, file = written(family, "f16")
    config, source = open_weights(folder)
    model = read_gguf(file)
    found = dict(model.tensors())
    assert found.keys() == set(source.keys())
    for name, tensor in found.items():
        expected = source.read(name)
        assert torch.equal(tensor, (expected.half() if tensor.dim() > 1 else expected).float()), name
    rows = synthetic_rows(1, seed=3, shortest=20)
    ours = streamed_logits(GGUFWeights(file, torch.float32), rows, torch.float32, torch.device("cpu"))
    weights = MergedWeights(folder)
    theirs = streamed_logits(weights, rows, torch.float32, torch.device("cpu"))
    weights.close()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    back = GGUFWeights(file, torch.float32).config
    for size in ("hidden_size", "head_dim", "num_kv_heads", "rope_theta", "rope_type", "max_position_embeddings"):
        assert getattr(back, size) == getattr(config, size), size


@pytest.mark.parametrize("family", ["llama", "llama tied with biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_tensors_equal_another_writer(written, tmp_path, family, kind):
    """Names, types and bytes are those of the writer of our tests, which follows llama.cpp's name table."""
    import transformers

    folder, _, file = written(family, kind.lower())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = write_as_converter(tmp_path / "other.gguf", FAMILIES[family][0], model, kind)
    mine, theirs = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (file, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8), np.asarray(theirs[name].data).view(np.uint8)), (
            name
        )


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_types_of_each_kind(written, kind):
    """Matrices are of the kind, vectors fp32; in 4-bit files embedding and head have 8 bits; narrow rows stay f16."""
    _, _, file = written("llama", kind)
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == kind
    assert types["output.weight"] == types["token_embd.weight"] == (kind if kind in ("f16", "q8_0") else "q8_0")
    assert types["output_norm.weight"] == "f32"


@pytest.mark.parametrize("template", ["native", "tutorial"])
@pytest.mark.skipif(not has_llamacpp(), reason="xllamacpp is not installed")
def test_llamacpp_asks_as_training_did(written, template):
    """llama.cpp loads the file, renders the template and cuts it into the ids that training started from.

    With BOS in the template's text and added again by llama.cpp a prompt would start with two.
    """
    _, prompt, file = written("llama 3.1", "f16", template)
    _, (answer,) = llamacpp_answers(file, [[{"role": "user", "content": QUESTION}]], 4, 512)
    assert answer.prompt_ids == prompt.prompt_ids(QUESTION)
    assert answer.prompt_ids.count(prompt.bos_id) == 1
    assert len(answer.ids) == len(answer.logprobs) > 0


@pytest.mark.parametrize("family", ["llama 3.1", "llama tied with biases", "qwen2", "qwen3"])
@pytest.mark.skipif(not has_llamacpp(), reason="xllamacpp is not installed")
def test_llamacpp_computes_what_we_compute(written, family):
    """Log probabilities of llama.cpp's own tokens are ours: q and k rows, biases, norms and rope are where they belong.

    Reader and writer could share a fault that only another program shows.
    """
    _, _, file = written(family, "f16")
    _, (answer,) = llamacpp_answers(file, [[{"role": "user", "content": QUESTION}]], 12, 512)
    logits = streamed_logits(
        GGUFWeights(file, torch.float32), [as_row(answer)], torch.float32, torch.device("cpu"), trained=True
    )
    assert len(answer.ids) == 12
    assert logprobs_apart([answer], logits).max() < 3e-3


def test_the_vocabulary_is_padded_and_typed(written):
    """Roles are control tokens though not marked special, <think> is user-defined, rows without a token are unused."""
    folder, prompt, _ = written("llama", "f16")
    tokenizer = load_tokenizer(folder)
    found = vocabulary(tokenizer, prompt, 640)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 640
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<｜User｜>"], kinds["<think>"], kinds["[PAD639]"], kinds["a"]) == (3, 4, 5, 1)
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True
    with pytest.raises(UnsupportedModelError, match="the embedding only 100 rows"):
        vocabulary(tokenizer, prompt, 100)


def test_bos_is_not_added_where_it_only_begins_the_turn(smollm2):
    """SmolLM2's bos is <|im_start|>: it opens each turn, and adding it would double the first."""
    tokenizer = load_tokenizer(smollm2)
    found = vocabulary(tokenizer, Prompt(tokenizer), 49152)
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_an_unknown_word_rule_is_refused(tmp_path):
    """A tokenizer that splits otherwise would get other ids in llama.cpp without a word: no file is written for it."""
    tokenizer = load_tokenizer(build_r1_tokenizer(tmp_path))
    assert word_rule(tokenizer) == "llama-bpe"
    tokenizer.core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(UnsupportedModelError, match="no name for"):
        word_rule(tokenizer)


def test_rope_settings_without_a_place_are_refused(tmp_path):
    """YaRN with its own beta_fast would be run with the usual one."""
    build_r1_tokenizer(tmp_path)
    save_tiny_model(tmp_path, "qwen2", rope_parameters={**ROPES["yarn"], "beta_fast": 16.0, "factor": 16.0})
    weights = MergedWeights(tmp_path)
    with pytest.raises(UnsupportedModelError, match="beta_fast"):
        write_gguf(tmp_path / "x.gguf", weights, Prompt(load_tokenizer(tmp_path)), "f16", "x")
    weights.close()


def test_a_missing_package_names_its_install_line(tmp_path, monkeypatch):
    """Without gguf: which extra to install."""
    build_r1_tokenizer(tmp_path)
    save_tiny_model(tmp_path, "llama")
    weights = MergedWeights(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"(?s)needs the gguf package.*deepdoctor\[gguf\]"):
        write_gguf(tmp_path / "x.gguf", weights, Prompt(load_tokenizer(tmp_path)), "f16", "x")
    weights.close()
