"""The adapter against PEFT: files, starts, logits both ways, dropout, rows switched off, and what load refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import draw_rows, hidden_states, packed_logits, random_adapter, their_logits, tiny_pair
from safetensors.torch import load_file, save_file

from deepdoctor.errors import ModelError
from deepdoctor.model.adapter import Adapter, LoraSettings, projection_sizes
from deepdoctor.model.decoder import Decoder
from helpers_models import tiny_model

peft = pytest.importorskip("peft")

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = draw_rows(7, 1, 20)
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"rslora": True},
    "k and down": {"targets": ("k_proj", "down_proj")},
    "o and gate": {"targets": ("o_proj", "gate_proj"), "rank": 1},
    "q, v, up": {"targets": ("q_proj", "v_proj", "up_proj"), "dropout": 0.3, "alpha": 2.5},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    """A tiny Qwen2 (biases, shared keys) in fp32; tests copy transformers' model before they adapt it."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"), "qwen2")


def peft_model(settings: LoraSettings) -> Any:
    """The same tiny model under PEFT, with random A and B."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=list(settings.targets),
    )
    model = peft.get_peft_model(tiny_model("qwen2"), config)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("case", SETTINGS)
def test_files_are_those_peft_writes(pair: tuple[Decoder, Any], tmp_path: Path, case: str) -> None:
    """Tensor names, shapes and dtype equal PEFT's own file, and every config field we write has PEFT's value."""
    adapter = random_adapter(pair[0], **SETTINGS[case])
    adapter.save(tmp_path / "ours", "some/base", "main")
    peft_model(adapter.settings).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    mine, wanted = (json.loads((tmp_path / s / "adapter_config.json").read_text()) for s in ("ours", "theirs"))
    assert set(mine) <= set(wanted)
    assert set(mine.pop("target_modules")) == set(wanted["target_modules"])
    assert (mine.pop("base_model_name_or_path"), mine.pop("revision")) == ("some/base", "main")
    assert mine == {key: wanted[key] for key in mine}


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_reads_ours(pair: tuple[Decoder, Any], tmp_path: Path, case: str) -> None:
    """PEFT on transformers gives our tuned logits from our files, and they differ from the base's."""
    decoder, _ = pair
    adapter = random_adapter(decoder, **SETTINGS[case])
    adapter.save(tmp_path, "tiny")
    expected = their_logits(peft.PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path)).eval(), ROWS)
    tuned = packed_logits(decoder, ROWS, adapter)
    assert torch.allclose(tuned, expected, rtol=0, atol=1e-4)
    assert (tuned - packed_logits(decoder, ROWS)).abs().max() > 0.01


@pytest.mark.parametrize("case", SETTINGS)
def test_we_read_pefts(pair: tuple[Decoder, Any], tmp_path: Path, case: str) -> None:
    """A folder PEFT wrote gives PEFT's logits here, and its settings come back."""
    decoder, _ = pair
    wanted = LoraSettings(**{"rank": 4, "alpha": 6, **SETTINGS[case]})
    model = peft_model(wanted)
    model.save_pretrained(str(tmp_path))
    adapter = Adapter.load(tmp_path, decoder.config)
    assert adapter.settings == wanted
    assert torch.allclose(packed_logits(decoder, ROWS, adapter), their_logits(model, ROWS), rtol=0, atol=1e-4)


def test_saved_and_loaded_is_the_same(pair: tuple[Decoder, Any], tmp_path: Path) -> None:
    """A round trip through our files keeps every bit; all-linear stands for the seven projections."""
    decoder, _ = pair
    adapter = random_adapter(decoder, rslora=True, dropout=0.1)
    adapter.save(tmp_path, "tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    rewrite(tmp_path, target_modules="all-linear")
    again = Adapter.load(tmp_path, decoder.config)
    assert again.settings == adapter.settings
    assert all(torch.equal(t, again.state()[name]) for name, t in adapter.state().items())
    assert again.trainable_parameters == sum(
        2 * again.settings.rank * (o + i) for o, i in projection_sizes(decoder.config).values()
    )


def test_start_is_pefts(pair: tuple[Decoder, Any]) -> None:
    """A is uniform within 1/sqrt(I), as PEFT's kaiming start is, B zero: the tuned side starts as the base, exactly."""
    decoder, _ = pair
    adapter = Adapter(decoder.config, LoraSettings(rank=16), seed=3)
    fresh = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(r=16, target_modules=list(ALL)))
    theirs = {n.split("layers.")[1]: p for n, p in fresh.named_parameters() if "lora_A" in n}
    for name, a in adapter.state().items():
        if "lora_B" in name:
            assert not a.any()
            continue
        bound = 1 / math.sqrt(a.shape[1])
        their_a = theirs[name.split("layers.")[1].replace(".weight", ".default.weight")].detach()
        for matrix in (a, their_a):
            assert 0.98 * bound < matrix.abs().max() <= bound
            assert abs(float(matrix.mean())) < 5 * bound / math.sqrt(3 * matrix.numel())
            assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.08)
    assert torch.equal(packed_logits(decoder, ROWS, adapter), packed_logits(decoder, ROWS))
    same, other = (Adapter(decoder.config, LoraSettings(rank=16), seed) for seed in (3, 4))
    assert torch.equal(same.a["1_up_proj"], adapter.a["1_up_proj"])
    assert not torch.equal(other.a["1_up_proj"], adapter.a["1_up_proj"])
    assert not torch.equal(adapter.a["0_up_proj"], adapter.a["1_up_proj"])


def test_dropout_acts_in_training_only(pair: tuple[Decoder, Any], tmp_path: Path) -> None:
    """In training each pass differs and its mean is the undropped output; in eval and without gradient it is PEFT's."""
    decoder, _ = pair
    adapter = random_adapter(decoder, dropout=0.5, targets=("k_proj", "down_proj"))
    adapter.save(tmp_path, "tiny")
    expected = their_logits(peft.PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path)).eval(), ROWS)
    adapter.train()
    assert torch.allclose(packed_logits(decoder, ROWS, adapter), expected, rtol=0, atol=1e-4)
    torch.manual_seed(0)
    first, second = (hidden_states(decoder, ROWS, adapter).detach() for _ in range(2))
    assert not torch.allclose(first, second, atol=0.01)
    adapter.eval()
    with_gradient = decoder.logits(hidden_states(decoder, ROWS, adapter))
    assert with_gradient.requires_grad
    assert torch.allclose(with_gradient, expected, rtol=0, atol=1e-4)


def test_dropout_keeps_the_mean(pair: tuple[Decoder, Any]) -> None:
    """Over 2,000 masks one layer's output averages to the output without dropout, blocks without adapter untouched."""
    decoder, _ = pair
    linear = decoder.layers[0].qkv
    adapter = random_adapter(decoder, dropout=0.25, targets=("k_proj",))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(2000, 64)
    torch.manual_seed(0)
    dropped = adapter.train().prepare(decoder)[0].qkv.apply(x, linear).detach()
    plain = adapter.eval().prepare(decoder)[0].qkv.apply(x, linear).detach()
    base = linear(x)
    assert torch.equal(dropped[:, :64], base[:, :64]) and torch.equal(dropped[:, 96:], base[:, 96:])
    spread = dropped[:, 64:96].std(0)
    assert (spread > 0.01).all()
    assert ((dropped.mean(0) - plain[0])[64:96].abs() < 5 * spread / math.sqrt(2000)).all()


def test_dropout_trains(pair: tuple[Decoder, Any]) -> None:
    """With dropout every adapter matrix gets a gradient."""
    decoder, _ = pair
    adapter = random_adapter(decoder, dropout=0.1).train()
    hidden_states(decoder, ROWS, adapter).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [ALL, ("k_proj", "up_proj")])
def test_tokens_switched_off_are_the_base(tmp_path: Path, targets: tuple[str, ...], dtype: torch.dtype) -> None:
    """In a mixed batch, rows with the adapter off get exactly the base's logits, rows with it on the tuned ones."""
    decoder, _ = tiny_pair(tmp_path, "llama", dtype)
    adapter = random_adapter(decoder, targets=targets)
    rows = draw_rows(5, 8, 1, 13)
    on = torch.cat([torch.full((len(row),), float(number % 2)) for number, row in enumerate(rows)]).bool()
    mixed = packed_logits(decoder, rows, adapter, on[:, None].to(dtype))
    base, tuned = packed_logits(decoder, rows), packed_logits(decoder, rows, adapter)
    assert torch.equal(mixed[~on], base[~on])
    assert (tuned - base)[on].abs().max() > 0.05
    atol = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(mixed[on], tuned[on], rtol=0, atol=atol)


def test_delta_is_the_change_of_a_weight(pair: tuple[Decoder, Any]) -> None:
    """delta() of a projection is scale * B A, what PEFT adds on merging; None where there is no adapter."""
    adapter = random_adapter(pair[0], rslora=True, targets=("q_proj", "down_proj"))
    b, a = adapter.b["1_down_proj"].double(), adapter.a["1_down_proj"].double()
    delta = adapter.delta(1, "down_proj")
    assert delta is not None and delta.shape == (64, 128) and not delta.requires_grad
    assert torch.allclose(delta.double(), 6 / 2 * b @ a, atol=1e-6)
    assert adapter.delta(1, "up_proj") is None


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of the saved config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"r": 8}, r"lora_A.weight is \(4, \d+\), expected \(8, \d+\)"),
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "trained biases": ({"bias": "all"}, "bias is 'all', expected 'none'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "ranks by module": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "a start that moves the base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "rank zero": ({"r": 0}, "r is 0, expected a positive number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "no targets": ({"target_modules": None}, "target_modules is None"),
    "a target we lack": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* must be among q_proj"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "0 tensors missing, 24 unknown"),
}


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_load_refuses_configs(pair: tuple[Decoder, Any], tmp_path: Path, case: str) -> None:
    """Anything but plain LoRA of this rank is refused with file, key and value."""
    random_adapter(pair[0]).save(tmp_path, "tiny")
    changes, message = CONFIG_FAULTS[case]
    rewrite(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        Adapter.load(tmp_path, pair[0].config)
    assert str(tmp_path) in caught.value.message


def test_load_refuses_broken_files(pair: tuple[Decoder, Any], tmp_path: Path) -> None:
    """No folder, text that is no JSON, a truncated, a missing and an incomplete weight file name file and remedy."""
    config = pair[0].config

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            Adapter.load(tmp_path / "a", config)
        assert str(tmp_path / "a") in caught.value.message and caught.value.hint

    refused(r"adapter_config.json cannot be read: .*No such file")
    random_adapter(pair[0]).save(tmp_path / "a", "tiny")
    settings, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    whole, data = settings.read_text(), weights.read_bytes()
    settings.write_text(whole[:40])
    refused(r"adapter_config.json cannot be read")
    settings.write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, not list"):
        Adapter.load(tmp_path / "a", config)
    settings.write_text(whole)
    weights.write_bytes(data[:-10])
    refused(r"adapter_model.safetensors cannot be read")
    weights.unlink()
    refused(r"adapter_model.safetensors cannot be read")
    weights.write_bytes(data)
    tensors = load_file(weights)
    removed = sorted(tensors)[3]
    save_file({n: t for n, t in tensors.items() if n != removed}, weights)
    refused(rf"1 tensors missing, 0 unknown \(first: {removed}\)")


def test_load_refuses_another_base(pair: tuple[Decoder, Any], tmp_path: Path) -> None:
    """An adapter of a wider base is refused with both shapes, one of a deeper base by its missing tensors."""
    random_adapter(pair[0]).save(tmp_path, "tiny")
    for changes, message in (
        ({"intermediate_size": 96}, r"gate_proj.lora_B.weight is \(128, 4\), expected \(96, 4\) for this base model"),
        ({"num_hidden_layers": 3}, "14 tensors missing, 0 unknown"),
    ):
        other = type(pair[0].config).from_dict({**pair[0].config.raw, **changes})
        with pytest.raises(ModelError, match=message):
            Adapter.load(tmp_path, other)
