"""The decoder against transformers, packed rows against rows alone, NF4 against its own dense values."""

from pathlib import Path

import pytest
import torch
from helpers_decoder import (
    dense_copy,
    draw_rows,
    gradients,
    hidden_states,
    packed_logits,
    random_adapter,
    their_logits,
    tiny_pair,
)
from torch import Tensor

from deepdoctor.kernels.linear_cross_entropy import linear_cross_entropy
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder, DecoderLayer
from deepdoctor.model.load import load_decoder, load_tokenizer
from helpers_models import ROPES, save_tiny_model

ROWS = draw_rows(5, 1, 90, 17)
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ALL = ROPES["yarn"] | {"beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.7}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, llama3 rope": ("llama", {"rope_parameters": ROPES["llama3"]}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied head, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 32, "rms_norm_eps": 1e-3}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "qwen2, yarn, every number": ("qwen2", {"rope_parameters": YARN_ALL}),
    "qwen3": ("qwen3", {}),
    "qwen3, biases, tied, yarn with its factor": (
        "qwen3",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": ROPES["yarn"] | {"attention_factor": 0.9},
        },
    ),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    """Four packed rows, one past the rope's original length, give the logits transformers gives row by row in fp32."""
    family, options = FAMILIES[case]
    ours, theirs = tiny_pair(tmp_path, family, **options)
    expected = their_logits(theirs, ROWS)
    assert expected.std() > 0.3
    assert torch.allclose(packed_logits(ours, ROWS), expected, rtol=0, atol=1e-4)


def test_rope_kinds_are_told_apart(tmp_path: Path) -> None:
    """The rows above are long enough that plain, llama3, linear and yarn positions all give other logits."""
    logits = []
    for number, rope in enumerate([None, ROPES["llama3"], LINEAR, ROPES["yarn"]]):
        folder = tmp_path / str(number)
        save_tiny_model(folder, "llama", **({"rope_parameters": rope} if rope else {}))
        logits.append(packed_logits(load_decoder(folder, "fp32"), ROWS))
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 0.01


def test_bf16_is_no_worse_than_transformers_bf16(tmp_path: Path) -> None:
    """Held and computed in bf16, our logits lie within twice the distance that transformers' bf16 keeps from fp32."""
    ours, theirs = tiny_pair(tmp_path, "qwen3", torch.bfloat16)
    stock = their_logits(theirs, ROWS).float()
    truth = their_logits(theirs.float(), ROWS)
    mine = packed_logits(ours, ROWS)
    assert mine.dtype == torch.bfloat16
    assert (mine.float() - truth).abs().mean() <= 2 * (stock - truth).abs().mean()


def test_real_model_equals_transformers(smollm2: Path) -> None:
    """SmolLM2 on a medical sentence of 40 tokens: fp32 logits (up to 30) within 1e-3, the same choice everywhere."""
    from transformers import AutoModelForCausalLM

    text = (
        "A 45-year-old man has chest pain and shortness of breath for three days. The physical examination shows "
        "crackles over the right lower lobe, and a chest radiograph is ordered to look for pneumonia or an effusion."
    )
    ids = load_tokenizer(smollm2).encode(text)[:40]
    assert len(ids) == 40
    expected = their_logits(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval(), [ids])
    logits = packed_logits(load_decoder(smollm2, "fp32"), [ids])
    assert (logits - expected).abs().max() < 1e-3
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def summed_loss(decoder: Decoder, rows: list[list[int]], adapter: Adapter) -> Tensor:
    """Summed next-token loss of all rows of two tokens and more."""
    ends = torch.cat([torch.arange(len(row)) < len(row) - 1 for row in rows])
    labels = torch.tensor([token for row in rows for token in row[1:]])
    return linear_cross_entropy(hidden_states(decoder, rows, adapter)[ends], decoder.head, labels).sum()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_rows_train_as_alone(tmp_path: Path, family: str) -> None:
    """Loss and every adapter gradient of packed rows are the sums over rows alone, to fp32 rounding."""
    decoder, _ = tiny_pair(tmp_path, family)
    adapter = random_adapter(decoder)
    rows = draw_rows(9, 2, 31, 14, seed=3)
    packed = summed_loss(decoder, rows, adapter)
    packed.backward()
    together = gradients(adapter)
    alone = torch.zeros(())
    for row in rows:
        loss = summed_loss(decoder, [row], adapter)
        loss.backward()
        alone += loss.detach()
    apart = gradients(adapter)
    assert float(packed.detach()) == pytest.approx(float(alone), rel=1e-6)
    assert together.keys() == apart.keys() == dict(adapter.named_parameters()).keys()
    for name, gradient in together.items():
        assert gradient.any(), name
        assert torch.allclose(gradient, apart[name], rtol=1e-4, atol=1e-5 * float(apart[name].abs().max())), name


def test_gradients_equal_peft(tmp_path: Path) -> None:
    """Loss and every adapter gradient equal what PEFT on transformers computes in fp32."""
    import peft

    decoder, theirs = tiny_pair(tmp_path, "qwen2")
    adapter = random_adapter(decoder)
    adapter.save(tmp_path / "adapter", "tiny")
    tuned = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"), is_trainable=True)
    row = draw_rows(33, seed=5)[0]
    loss = tuned(torch.tensor([row]), labels=torch.tensor([row])).loss
    loss.backward()
    expected = {n.replace(".default", ""): p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    ours = summed_loss(decoder, [row], adapter) / 32
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert len(expected) == len(adapter.state()) == 28
    for key, parameter in adapter.named_parameters():
        side, name = key.split(".", 1)
        layer, projection = name.split("_", 1)
        (their_name,) = [n for n in expected if f"layers.{layer}." in n and f"{projection}.lora_{side.upper()}." in n]
        wanted = expected[their_name]
        assert torch.allclose(parameter.grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())), key


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nf4_trains_as_its_dense_values_and_keeps_none(tmp_path: Path, dropout: float) -> None:
    """An NF4 base gives the bits its dequantised weights give, forward and backward, with no dense matrix saved."""
    save_tiny_model(tmp_path, "llama", attention_bias=True)
    decoder = load_decoder(tmp_path, "nf4", compute_dtype=torch.float32)
    dense = dense_copy(decoder)
    adapter = random_adapter(decoder, targets=("q_proj", "v_proj", "up_proj"), dropout=dropout)
    rows = draw_rows(9, 14)
    shapes = set()
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        assert all(linear.weight is None for linear in layer.linears)
        shapes |= {(sum(linear.sizes), linear.in_features) for linear in layer.linears}
    shapes |= {(i, o) for o, i in shapes}
    saved: list[tuple[int, ...]] = []

    def note(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = summed_loss(decoder, rows, adapter)
    assert len(saved) > 20 and not shapes & set(saved)
    loss.backward()
    found = gradients(adapter)
    torch.manual_seed(0)
    expected = summed_loss(dense, rows, adapter)
    expected.backward()
    wanted = gradients(adapter)
    assert torch.equal(loss, expected)
    assert len(found) == 12 and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert decoder.nbytes < dense.nbytes
    plain = load_decoder(tmp_path, "fp32")
    assert (packed_logits(plain, rows) - packed_logits(decoder, rows)).abs().max() > 0.01


def test_rows_do_not_see_each_other(tmp_path: Path) -> None:
    """Changing one packed row leaves the other rows' logits bit for bit as they were."""
    decoder, _ = tiny_pair(tmp_path)
    a, b, c, other = draw_rows(6, 11, 4, 11)
    before, after = packed_logits(decoder, [a, b, c]), packed_logits(decoder, [a, other, c])
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[17:], after[17:])
    assert not torch.equal(before[6:17], after[6:17])


def test_bytes_are_those_held(tmp_path: Path) -> None:
    """nbytes counts every frozen tensor once: 4 bytes a weight in fp32, a tied head not twice."""
    for tied in (False, True):
        decoder, theirs = tiny_pair(tmp_path / str(tied), "qwen2", tie_word_embeddings=tied)
        assert decoder.nbytes == 4 * sum(p.numel() for p in theirs.parameters())
        assert (decoder.head is decoder.embedding) == tied
        assert not any(p.requires_grad for p in decoder.parameters())


def test_unwritten_memory_does_not_matter(tmp_path: Path) -> None:
    """Loss and gradients are the same bits where PyTorch fills fresh memory with nan, from an NF4 base too."""
    save_tiny_model(tmp_path, "qwen3")
    rows = draw_rows(9, 14)
    for precision in ("fp32", "nf4"):
        decoder = load_decoder(tmp_path, precision, compute_dtype=torch.float32)
        adapter = random_adapter(decoder, targets=("k_proj", "up_proj"))
        summed_loss(decoder, rows, adapter).backward()
        expected = gradients(adapter)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            summed_loss(decoder, rows, adapter).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(adapter).items())
