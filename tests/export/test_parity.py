"""The parity check lets a sound merge pass whatever the model makes of rounding, and refuses a wrong one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepdoctor import pipeline
from deepdoctor.errors import ParityError
from deepdoctor.export import stage
from deepdoctor.export.measure import logits_of, streamed_logits
from deepdoctor.export.merge import MergedWeights, merge
from deepdoctor.export.parity import ShakenWeights, compare_logits, shaken_adapter
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.load import load_decoder
from helpers_merge import spoiled_merge
from helpers_models import tiny_model
from helpers_run import tiny_recipe
from helpers_train import synthetic_rows

ROWS = synthetic_rows(2, seed=5, shortest=40)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One tiny Llama, published in each dtype."""
    root = tmp_path_factory.mktemp("bases")
    for name, dtype in DTYPES.items():
        tiny_model("llama").to(dtype).save_pretrained(root / name)
    return root


def large_adapter(config, std: float) -> Adapter:
    """An adapter whose products are ``std`` times what usual ones are; from 1 on they are larger than the base."""
    adapter = Adapter(config, LoraSettings(rank=4, alpha=8), seed=1).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(std=std)
    return adapter


def parity_of(path, folder, precision: str, adapter_std: float, spoil=None):
    """The parity of a merge into ``folder``, the base computed in ``precision``; spoil: changes the merged tensors."""
    decoder = load_decoder(path, precision)
    adapter = large_adapter(decoder.config, adapter_std)
    dtype = merge(path, adapter, folder)
    if spoil is not None:
        file = folder / "model.safetensors"
        save_file(spoil(load_file(file), load_file(path / "model.safetensors")), file, metadata={"format": "pt"})

    def shaken(seed: int) -> torch.Tensor:
        weights, computed = MergedWeights(path), decoder.compute_dtype
        try:
            base = ShakenWeights(weights, adapter, (dtype, computed), seed)
            return streamed_logits(base, ROWS, computed, CPU, shaken_adapter(adapter, computed, seed))
        finally:
            weights.close()

    found = logits_of(load_decoder(folder, precision), None, ROWS)
    tuned, alone = (logits_of(decoder, one, ROWS) for one in (adapter, None))
    return compare_logits(found, tuned, alone, decoder.config, decoder.compute_dtype, dtype, shaken)


@pytest.mark.parametrize("std", [0.01, 0.1, 1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DTYPES)
def test_a_sound_merge_passes(bases, tmp_path, name, precision, std):
    """Under large adapters attention is sharp and rounding moves logits further than the number of layers explains.

    Such merges used to be refused: error 0.0134, allowed 0.0123.
    """
    parity = parity_of(bases / name, tmp_path, precision, std)
    assert parity.passed, parity
    assert parity.effect_kept == pytest.approx(1, abs=0.2)


WRONG = {
    "left out": lambda right, base: base,
    "half": lambda right, base: {key: (base[key] + (right[key] - base[key]) / 2).to(right[key].dtype) for key in right},
    "twice": lambda right, base: {key: right[key] + (right[key] - base[key]) for key in right},
    "wrong sign": lambda right, base: {key: base[key] - (right[key] - base[key]) for key in right},
    "one layer left out": lambda right, base: {**right, **{key: base[key] for key in right if ".layers.1." in key}},
    "one weight rolled": lambda right, base: {
        **right, "model.layers.1.mlp.down_proj.weight": right["model.layers.1.mlp.down_proj.weight"].roll(1, 0)
    },
    "coarsely rounded": lambda right, base: {
        key: value if "_proj" not in key else (value.float() / 0.1).round().mul(0.1).to(value.dtype)
        for key, value in right.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("std", [0.1, 2.0])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_merge_is_refused(bases, tmp_path, what, std):
    """Also where rounding is measured because the reckoning does not suffice."""
    parity = parity_of(bases / "bfloat16", tmp_path, "bf16", std, WRONG[what])
    assert parity.rounding is not None
    assert not parity.passed, parity


def test_weights_are_moved_by_half_a_unit_in_the_last_place(bases):
    """Of the merged weight's dtype, up and down alike, and nothing but projections; rounding never moves more."""
    weights = MergedWeights(bases / "float32")
    adapter = large_adapter(weights.config, 1.0)
    moved = ShakenWeights(weights, adapter, (torch.bfloat16, torch.float32), seed=0)
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = weights.read(name), moved.read(name)
    merged = before + adapter.delta(0, "up_proj")
    step = torch.nextafter(merged.bfloat16().abs(), torch.tensor(torch.inf)).float() - merged.bfloat16().abs().float()
    ratio = (after - before).abs() / step
    assert ((ratio - 0.5).abs() < 0.01).float().mean() > 0.99, "else the merged weight is next to a power of two"
    assert ((merged.bfloat16().float() - merged).abs() <= (after - before).abs() * 1.01).all()
    assert abs(float((after > before).float().mean()) - 0.5) < 0.02
    assert torch.equal(moved.read("model.norm.weight"), weights.read("model.norm.weight"))
    weights.close()


def test_a_run_with_a_large_adapter_is_exported(tiny_r1, tmp_path, monkeypatch):
    """A whole run at a learning rate far too large exports; with a spoilt tensor the same run does not."""
    large = {"learning_rate": 0.3, "max_steps": 6}
    values = tiny_recipe(tiny_r1, tmp_path, ask={"questions": []}, train=large)
    folder = pipeline.run(values, stages=("data", "train", "export")).folder
    parity = json.loads((folder / "export" / "merged" / "parity.json").read_text(encoding="utf-8"))
    assert parity["passed"] and parity["rounding"] is not None

    monkeypatch.setattr(stage, "merge", spoiled_merge)
    with pytest.raises(ParityError, match="the merged model differs from base"):
        pipeline.run({**values, "name": "again"}, stages=("data", "train", "export"))
