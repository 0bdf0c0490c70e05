"""The export stage: folders that others load as they are, checked before they exist."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers

from deepdoctor import pipeline
from deepdoctor.data.prompt import EncodedRow, Prompt
from deepdoctor.errors import ParityError, RunError
from deepdoctor.export import merge as merging
from deepdoctor.export import stage
from deepdoctor.export.measure import logits_of
from deepdoctor.export.parity import check_parity
from deepdoctor.export.stage import generation_config
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.model.tokenizer import Tokenizer
from helpers_merge import spoiled_merge
from helpers_run import snapshot, tiny_recipe

STAGES = ("data", "train", "export")
QUESTION = "What is the best next step in management?"


def two_ends() -> Tokenizer:
    """A ChatML tokenizer whose own EOS is not the token that ends a turn, as Qwen's base models have."""
    core = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    return Tokenizer(core, eos="<|endoftext|>", pad="<|pad|>")


@pytest.fixture(scope="module")
def exported(tiny_r1, tmp_path_factory):
    """The run folder of a whole small run."""
    folder = tmp_path_factory.mktemp("export")
    base = folder / "base"
    shutil.copytree(tiny_r1, base)
    advice = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1, "transformers_version": "4.39.3"}
    (base / "generation_config.json").write_text(json.dumps(advice), encoding="utf-8")
    values = tiny_recipe(base, folder, ask={"questions": []}, train={"max_steps": 6, "learning_rate": 5e-2})
    values["model"]["precision"] = "fp32"
    return pipeline.run(values, stages=STAGES).folder, values


@pytest.fixture
def again(exported, tmp_path):
    """A copy of the run without its exports, and a function that exports it."""
    folder, values = exported
    values = {**values, "runs_dir": str(tmp_path)}
    copy = tmp_path / values["name"]
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "export")
    return copy, lambda **changes: pipeline.run({**values, **changes}, resume=True, stages=("export",))


def logits(model, ids):
    """(T, V) fp32 of a transformers model."""
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def test_each_export_has_its_own_folder(exported):
    """The adapter's files and the merged model's are never mixed; both carry tokenizer, template and card."""
    folder, _ = exported
    files = {kind: {p.name for p in (folder / "export" / kind).iterdir()} for kind in ("adapter", "merged")}
    both = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md"}
    assert files["adapter"] == both | {"adapter_model.safetensors", "adapter_config.json"}
    assert files["merged"] == both | {"model.safetensors", "config.json", "generation_config.json", "parity.json"}
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["adapter", "merged"]


def test_peft_and_transformers_answer_as_the_run_does(exported):
    """The card's own lines load both folders; their logits are those of our base + adapter, and not the base's."""
    pytest.importorskip("peft")
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder, values = exported
    decoder = load_decoder(Path(values["model"]["id"]), "fp32")
    adapter = Adapter.load(folder / "train" / "adapter", decoder.config).eval()
    ids = list(range(40, 100))
    row = EncodedRow(ids, ids, (0, 0), (0, len(ids)))
    expected, base = logits_of(decoder, adapter, [row]), logits_of(decoder, None, [row])
    assert (expected - base).abs().max() > 0.05
    peft = AutoPeftModelForCausalLM.from_pretrained(folder / "export" / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(peft, ids), expected, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(folder / "export" / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_tokenizer_asks_as_training_did(exported, kind):
    """AutoTokenizer reads it, and its chat template gives the ids that training started from."""
    from transformers import AutoTokenizer

    folder, values = exported
    prompt = Prompt(load_tokenizer(Path(values["model"]["id"])))
    theirs = AutoTokenizer.from_pretrained(folder / "export" / kind)
    messages = [{"role": "user", "content": QUESTION}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(ids) == prompt.prompt_ids(QUESTION)
    assert theirs.pad_token_id != theirs.eos_token_id == prompt.eos_id


def test_the_merged_model_knows_when_to_stop(exported):
    """generation_config.json, which was not written, has the stop tokens, bos, a pad of its own and R1's sampling."""
    from transformers import GenerationConfig

    folder, values = exported
    prompt = Prompt(load_tokenizer(Path(values["model"]["id"])))
    config = GenerationConfig.from_pretrained(folder / "export" / "merged")
    assert config.eos_token_id == list(prompt.stop_ids)
    assert config.bos_token_id == prompt.tokenizer.bos_id
    assert config.pad_token_id == prompt.tokenizer.pad_id
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.95)


def test_advice_and_stop_tokens_come_from_base_and_prompt(tmp_path):
    """Every entry of the base's file is kept but its ids; without a file what the tokenizer knows is used."""
    tokenizer = two_ends()
    prompt = Prompt(tokenizer, "chatml")
    advice = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    given = {**advice, "eos_token_id": 999, "transformers_version": "4.30.0", "_from_model_config": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(given), encoding="utf-8")
    ids = {"eos_token_id": list(prompt.stop_ids), "pad_token_id": tokenizer.pad_id}
    assert len(prompt.stop_ids) == 2
    assert generation_config(tmp_path, prompt) == {**advice, **ids}
    assert generation_config(tmp_path / "model.gguf", prompt) == ids


def test_the_parity_check_is_on_record(exported):
    """parity.json says passed, with the adapter's effect far above the difference; the card quotes it."""
    folder, _ = exported
    parity = json.loads((folder / "export" / "merged" / "parity.json").read_text(encoding="utf-8"))
    assert parity["passed"]
    assert parity["logit_difference"] <= parity["allowed"] < parity["adapter_effect"] / 100
    card = (folder / "export" / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"greedy agreement {parity['greedy_agreement']:.1%} of {parity['positions']} positions" in card
    assert "not clinical guidance" in card
    assert re.search(r"LoRA rank 4, alpha 8", card)


def test_a_complete_export_is_left_alone(exported):
    """Exporting again writes nothing."""
    folder, values = exported
    before = snapshot(folder / "export")
    pipeline.run(values, resume=True, stages=("export",))
    assert snapshot(folder / "export") == before


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_only_what_is_asked_for(again, kind):
    """One kind switched off is not written."""
    copy, export = again
    result = export(export={kind: False})
    left = {"adapter", "merged"} - {kind}
    assert set(result.exported) == left == {p.name for p in (copy / "export").iterdir()}


def test_a_wrong_merge_leaves_nothing_behind(again, monkeypatch):
    """One tensor spoilt on the way: ParityError, no merged folder under any name, the adapter still there.

    The half-made folder used to stay under its temporary name.
    """
    copy, export = again

    monkeypatch.setattr(stage, "merge", spoiled_merge)
    with pytest.raises(ParityError, match="the merged model differs from base"):
        export()
    assert [p.name for p in (copy / "export").iterdir()] == ["adapter"]
    monkeypatch.undo()
    assert set(export().exported) == {"adapter", "merged"}


def test_a_forgotten_adapter_is_noticed(smollm2):
    """An adapter with a small effect could be lost in the merge and pass: what rounding explains was larger than it."""
    base = load_decoder(smollm2, "bf16")
    adapter = Adapter(base.config, LoraSettings(), seed=1)
    generator = torch.Generator().manual_seed(1)
    for b in adapter.b.values():
        torch.nn.init.normal_(b, std=2e-3, generator=generator)
    ids = torch.randint(3, 40000, (64,), generator=generator).tolist()
    row = EncodedRow(ids, ids, (0, 32), (32, 64))
    parity = check_parity(base, adapter, base, [row], torch.bfloat16)
    assert parity.logit_difference <= parity.allowed and parity.effect_kept == 0
    assert not parity.passed


def test_a_full_disk_is_a_run_error(again, monkeypatch):
    """safetensors' own word for a full disk comes out as a RunError with a way on, and no half of a model stays."""
    copy, export = again

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(merging, "save_file", full)
    with pytest.raises(RunError, match=r"merged could not be written.*No space left on device") as caught:
        export()
    assert "--resume" in caught.value.hint
    assert [p.name for p in (copy / "export").iterdir()] == ["adapter"]


def test_a_disk_that_fills_at_the_end_of_training_loses_nothing(tiny_r1, tmp_path, monkeypatch):
    """The trained adapter cannot be written: a RunError, no half of it, and --resume writes it from the checkpoint."""
    values = tiny_recipe(tiny_r1, tmp_path, ask={"questions": []})
    write = Adapter.save

    def full(adapter, folder, *args):
        if folder.name == ".adapter.partial":
            folder.mkdir()
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(adapter, folder, *args)

    monkeypatch.setattr(Adapter, "save", full)
    with pytest.raises(RunError, match=r"adapter could not be written.*No space left on device"):
        pipeline.run(values, stages=("data", "train"))
    train = tmp_path / "runs" / "tiny" / "train"
    assert not (train / "adapter").exists() and not (train / ".adapter.partial").exists()
    monkeypatch.undo()
    lines = (train / "metrics.jsonl").read_bytes()
    pipeline.run(values, resume=True, stages=("data", "train"))
    assert (train / "adapter" / "adapter_model.safetensors").is_file()
    assert (train / "metrics.jsonl").read_bytes() == lines, "no step was taken again"
