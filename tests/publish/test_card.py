"""The card on the Hub: true to the run, valid for the Hub, and loadable as it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_publish import BASE, QUICK, made_run, online
from safetensors.torch import load_file

from deepdoctor import pipeline
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.export.card import card_text
from deepdoctor.export.licences import Licence, base_licences, data_licence, hub_id
from deepdoctor.export.measure import logits_of
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.load import load_decoder
from deepdoctor.publish.stage import push_run
from helpers_hub import WRITE, local_hub
from helpers_run import PROJECT, tiny_recipe, write_rows

REPOS = {
    "adapter": "tester/demo-lora",
    "merged": "tester/demo",
    "merged_4bit": "tester/demo-bnb-4bit",
    "gguf": "tester/demo-gguf",
}
LIBRARY = {"adapter": "peft", "merged": "transformers", "merged_4bit": "transformers", "gguf": "gguf"}


def parts(text: str) -> tuple[dict, str]:
    """Metadata and body."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.fixture
def card(tmp_path):
    """A function that gives the card of a made run."""
    run = made_run(tmp_path)
    stats = json.loads((run.path / "compare/stats.json").read_text(encoding="utf-8"))

    def make(kind="merged", **options):
        manifest = options.pop("manifest", run.manifest)
        return card_text(kind, manifest, **{"stats": stats, "repos": REPOS, **options})

    make.manifest = run.manifest
    return make


@pytest.mark.parametrize("kind", REPOS)
def test_hugging_face_reads_the_metadata(card, kind):
    """ModelCard parses it, the measured results come back out of ``model-index``, and its own YAML is the same."""
    from huggingface_hub import ModelCard

    text = card(kind)
    found = ModelCard(text)
    assert parts(found.content)[0].keys() == parts(text)[0].keys()
    results = {result.metric_type: result for result in found.data.eval_results}
    assert results["accuracy"].metric_value == 0.5
    assert results["accuracy"].dataset_name == "medqa"
    assert results["accuracy"].metric_args["ci_low"] == 0.02
    assert results["accuracy"].metric_args["verdict"] == "better"
    assert results["loss"].dataset_revision == "fc2c9e8a"
    assert found.data.license == "other" and found.data.license_name == "mit-and-llama3.1"
    assert found.data.datasets == ["FreedomIntelligence/medical-o1-reasoning-SFT"]
    assert found.data.to_dict()["library_name"] == LIBRARY[kind]
    assert found.data.base_model == ("tester/demo" if kind in ("merged_4bit", "gguf") else BASE)
    assert "&id" not in text


def test_card_says_what_was_measured_and_what_not(card):
    """Interval, p and verdict; overlap; and without questions that have a key, that nothing says answers are right."""
    _, body = parts(card())
    assert "| medqa | 100 | 40.0% | 50.0% | +10.0% | +2.0% to +18.0% | 0.011 | **better** |" in body
    assert "3 of 100 questions look like one of the 100 training rows" in body
    assert "Research only, not clinical guidance" in body
    metadata, body = parts(card(stats=None))
    assert "model-index" not in metadata
    assert "whether its answers are right was not measured" in body


def test_licences_of_base_and_rows(card):
    """R1-Distill is MIT on a Llama base: both stand there, with the notice; a Qwen one needs none."""
    _, body = parts(card())
    assert "**Built with Llama.**" in body
    assert "`meta-llama/Llama-3.1-8B`, llama3.1" in body
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc." in body
    assert "this name does not begin so" in body
    assert "does not begin so" not in card(repos={"merged": "tester/Llama-demo"})
    assert "rows: `FreedomIntelligence/medical-o1-reasoning-SFT`, apache-2.0" in body
    manifest = json.loads(json.dumps(card.manifest))
    manifest["recipe"]["model"]["id"] = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    metadata, body = parts(card(manifest=manifest))
    assert metadata["license"] == "mit" and "Llama" not in body
    manifest["recipe"]["model"]["id"] = "somebody/model"
    metadata, body = parts(card(manifest=manifest))
    assert metadata["license"] == "other" and metadata["license_link"] == "https://huggingface.co/somebody/model"
    assert "licence not known here: [see its card](https://huggingface.co/somebody/model)" in body
    metadata, body = parts(card(manifest=manifest, licences=[Licence("somebody/model", "cc-by-4.0")]))
    assert metadata["license"] == "cc-by-4.0"


def test_an_unknown_child_of_llama_never_gets_a_plain_licence(card):
    """Its card on the Hub may say MIT and forget Llama; one that says Llama needs no more words."""
    manifest = json.loads(json.dumps(card.manifest))
    model = manifest["recipe"]["model"]["id"] = "somebody/DeepSeek-R1-Distill-Llama-8B-medical"
    metadata, body = parts(card(manifest=manifest, licences=[Licence(model, "mit")]))
    assert metadata["license"] == "other" and metadata["license_link"].endswith(model)
    assert "the model it was made from: a Llama model, by its name, licence not known here: [see its card]" in body
    metadata, body = parts(card(manifest=manifest, licences=[Licence(model, "llama3.2")]))
    assert metadata["license"] == "llama3.2" and "**Built with Llama.**" in body
    assert "Llama 3.2 is licensed under" in body and "by its name" not in body


@pytest.mark.parametrize(
    ("model", "ids"),
    [
        ("unsloth/DeepSeek-R1-Distill-Llama-8B", ["mit", "llama3.1"]),
        ("unsloth/DeepSeek-R1-Distill-Llama-8B-bnb-4bit", ["mit", "llama3.1"]),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", ["mit", "llama3.3"]),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", ["mit", "apache-2.0"]),
        ("FreedomIntelligence/HuatuoGPT-o1-8B", ["apache-2.0", "llama3.1"]),
        ("meta-llama/Llama-3.1-8B-Instruct", ["llama3.1"]),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ["apache-2.0"]),
        ("somebody/else", [""]),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B-abliterated", ["", ""]),
        ("somebody/DeepSeek-R1-Distill-Llama-8B", ["", ""]),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-3B", [""]),
        ("Qwen/Qwen3-Max", [""]),
        ("Qwen/Qwen3-8B", ["apache-2.0"]),
        ("Qwen/Qwen2.5-3B-Instruct", [""]),
        ("FreedomIntelligence/HuatuoGPT-o1-72B", [""]),
        ("meta-llama/Llama-3.2-1B", ["", ""]),
        ("HuggingFaceTB/SmolLM2-nightly", [""]),
        (None, [""]),
    ],
)
def test_known_licences(model, ids):
    """The base's own first, then that of the model under it; a name that only resembles a known one has none."""
    assert [licence.id for licence in base_licences(model)] == ids


def test_names_of_this_machine_stay_here(card, tmp_path):
    """A local base and a file of rows are named without their folders."""
    rows = tmp_path / "ward 7" / "rows.jsonl"
    rows.parent.mkdir()
    rows.touch()
    manifest = json.loads(json.dumps(card.manifest))
    manifest["recipe"]["model"]["id"] = str(tmp_path)
    manifest["recipe"]["data"]["source"] = str(rows)
    text = card(manifest=manifest)
    assert str(tmp_path) not in text
    assert "rows: `rows.jsonl`" in text
    assert "datasets" not in parts(text)[0] and "base_model" not in parts(text)[0]
    assert hub_id(str(tmp_path)) is None and data_licence("rows.jsonl").id == ""


def test_every_loader_is_shown(card):
    """PEFT, transformers, vLLM and Ollama, with the repository's name and never this machine's."""
    for kind in REPOS:
        code = "\n".join(re.findall(r"```\w+\n(.*?)```", card(kind), re.DOTALL))
        assert "PATH_OF" not in code
        assert "ollama run hf.co/tester/demo-gguf" in code
        for block in re.findall(r"```python\n(.*?)```", card(kind), re.DOTALL):
            compile(block, kind, "exec")
    assert "vllm serve tester/demo\n" in card("merged")
    assert "vllm serve tester/demo-bnb-4bit\n" in card("merged_4bit")
    assert "pip install bitsandbytes" in card("merged_4bit") and "bitsandbytes" not in card("merged")
    assert "--enable-lora --max-lora-rank 16 --lora-modules tuned=tester/demo-lora" in card("adapter")


LOADER = """
import sys, torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([list(range(40, 100))])
with torch.inference_mode():
    peft = AutoPeftModelForCausalLM.from_pretrained("tester/demo-lora", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained("tester/demo", dtype=torch.float32)
    found = {"peft": peft.eval()(input_ids=ids).logits[0], "merged": merged.eval()(input_ids=ids).logits[0]}
    asked = AutoTokenizer.from_pretrained("tester/demo").apply_chat_template(
        [{"role": "user", "content": "What is the dose?"}], add_generation_prompt=True, return_dict=False)
    question = torch.tensor([list(asked)])
    four = AutoModelForCausalLM.from_pretrained("tester/demo-bnb-4bit", dtype=torch.float32)
    assert type(four.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    found["four"] = four.eval()(input_ids=ids).logits[0]
    for name, model in (("peft", peft), ("merged", merged)):
        found["answer_" + name] = model.generate(question, max_new_tokens=12, do_sample=False)[0]
save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[1])
print(snapshot_download("tester/demo-lora"))
print(snapshot_download("tester/demo"))
print(snapshot_download("tester/demo-bnb-4bit"))
"""


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "xet"])
def test_stock_libraries_load_what_was_pushed(tiny_r1, tmp_path, monkeypatch, xet):
    """PEFT, transformers and snapshot_download, in a process that knows only the Hub, give our logits and bytes."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    questions = [
        {"id": str(n), "question": f"Which drug {n}?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "A"}
        for n in range(4)
    ]
    task = write_rows(tmp_path / "questions.jsonl", questions)
    values = tiny_recipe(tiny_r1, tmp_path, ask={"questions": []}, compare={"tasks": [str(task)]})
    values["model"]["precision"] = "fp32"
    values["train"]["learning_rate"] = 5e-2
    values["export"] = {"merged_4bit": True}
    run = pipeline.run(values).folder
    with local_hub(tmp_path / "hub", xet) as hub:
        online(monkeypatch, hub)
        from huggingface_hub import HfApi

        api = HfApi(endpoint=hub.url, token=WRITE)
        api.create_repo("tester/base")
        api.upload_folder(repo_id="tester/base", folder_path=tiny_r1)
        push_run(run, "tester/demo", token=WRITE, base="tester/base", endpoint=hub.url, patience=QUICK)
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": WRITE}
        environment |= {"HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        out = tmp_path / "logits.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", LOADER, str(out)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        card = hub.read("tester/demo", "README.md").decode()
    decoder = load_decoder(tiny_r1, "fp32")
    adapter = Adapter.load(run / "train" / "adapter", decoder.config).eval()
    ids = list(range(40, 100))
    expected = logits_of(decoder, adapter, [EncodedRow(ids, ids, (0, 0), (0, len(ids)))])
    base = logits_of(decoder, None, [EncodedRow(ids, ids, (0, 0), (0, len(ids)))])
    assert (expected - base).abs().max() > 0.05
    found = load_file(out)
    torch.testing.assert_close(found["peft"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["merged"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["answer_peft"], found["answer_merged"])
    four = load_decoder(run / "export" / "merged_4bit", "nf4", compute_dtype=torch.float32)
    ours = logits_of(four, None, [EncodedRow(ids, ids, (0, 0), (0, len(ids)))])
    assert (found["four"] - ours).abs().max() < 0.05 * ours.std()
    for place, kind in zip(done.stdout.split(), ("adapter", "merged", "merged_4bit"), strict=True):
        for path in (run / "export" / kind).iterdir():
            if path.name not in ("README.md", "adapter_config.json"):
                assert (Path(place) / path.name).read_bytes() == path.read_bytes()
    assert parts(card)[0]["model-index"][0]["results"]
    assert str(tmp_path) not in card and str(PROJECT) not in card
