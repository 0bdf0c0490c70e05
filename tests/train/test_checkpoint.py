"""A checkpoint is whole or not there, and only its own recipe goes on from it."""

import json
import resource
from contextlib import contextmanager, nullcontext

import pytest
import torch

from deepdoctor.errors import RunError
from deepdoctor.model.load import load_decoder
from deepdoctor.train import checkpoint
from deepdoctor.train.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from deepdoctor.train.flat import FlatAdapter
from deepdoctor.train.optimizer import make_optimizer
from helpers_train import new_adapter, short_section


@pytest.fixture(scope="module")
def decoder(tiny_r1):
    """The tiny base in fp32."""
    return load_decoder(tiny_r1, "fp32")


@pytest.fixture
def trained(decoder):
    """An adapter and its optimizer after one step with random gradients."""
    section = short_section()
    adapter = new_adapter(decoder, section)
    parameters = list(adapter.parameters())
    optimizer, _ = make_optimizer(parameters, "adamw", 1e-2, 0.0, (0.9, 0.999), decoder.device)
    torch.manual_seed(1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return adapter, optimizer


def save(folder, trained, step, fingerprint="f", keep=2):
    """Save at ``step``."""
    return save_checkpoint(folder, *trained, Progress(step, 100 * step), fingerprint, "base", keep)


@contextmanager
def no_file_above(size):
    """Let the system refuse to write more than ``size`` bytes into any file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_everything_comes_back(decoder, trained, tmp_path):
    """Adapter, optimizer, random state and progress are restored exactly."""
    adapter, optimizer = trained
    torch.manual_seed(5)
    path = save(tmp_path, trained, 7)
    expected = torch.rand(4)
    other = new_adapter(decoder, short_section(), seed=99)
    fresh, _ = make_optimizer(other.parameters(), "adamw", 1e-2, 0.0, (0.9, 0.999), decoder.device)
    assert load_checkpoint(path, other, fresh, "f") == Progress(7, 700)
    assert torch.equal(torch.rand(4), expected)
    for a, b in zip(adapter.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(fresh.state_dict()["state"][number][name], value)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_flat_and_single_checkpoints_are_the_same_files(decoder, tmp_path, kind):
    """Written flat or single, the bytes are the same, and the flat run goes on from the single run's folder."""
    section = short_section(lora_rank=128)

    def make(adapter, parameters):
        for number, p in enumerate(adapter.parameters()):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
        return make_optimizer(parameters, kind, 1e-2, 0.0, (0.9, 0.999), decoder.device)[0]

    single = new_adapter(decoder, section)
    flat = FlatAdapter(new_adapter(decoder, section))
    of_single = make(single, single.parameters())
    of_flat = make(flat.adapter, [flat.parameter])
    of_single.step()
    of_flat.step()
    theirs = save_checkpoint(tmp_path / "single", single, of_single, Progress(1), "f", "base", 2)
    mine = save_checkpoint(tmp_path / "flat", flat.adapter, of_flat, Progress(1), "f", "base", 2, flat.pieces)
    for path in theirs.iterdir():
        assert (mine / path.name).read_bytes() == path.read_bytes(), path.name
    other = FlatAdapter(new_adapter(decoder, section, seed=99))
    of_other = make(other.adapter, [other.parameter])
    assert load_checkpoint(theirs, other.adapter, of_other, "f", other.pieces) == Progress(1)
    assert torch.equal(other.parameter, flat.parameter)
    of_other.step()
    of_flat.step()
    assert torch.equal(other.parameter, flat.parameter)
    assert load_checkpoint(mine, single, of_single, "f") == Progress(1)


def test_it_is_safetensors_and_json_and_peft_reads_the_adapter(trained, tmp_path):
    """No file needs unpickling, and the adapter in it has PEFT's two files."""
    path = save(tmp_path, trained, 1)
    names = sorted(p.name for p in path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]


def test_only_the_newest_are_kept(trained, tmp_path):
    """keep_checkpoints counts by step number, also past six digits."""
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, trained, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_half_a_checkpoint_is_none(trained, tmp_path):
    """What a killed run left under a temporary name is not taken up, and is in nobody's way."""
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(save(tmp_path, trained, 2).parent).name == "step-000002"


def test_another_recipe_is_refused(trained, tmp_path):
    """The fingerprint differs: nothing is restored and the error says what to do."""
    path = save(tmp_path, trained, 3)
    before = [p.detach().clone() for p in trained[0].parameters()]
    with pytest.raises(RunError, match="made by another recipe") as caught:
        load_checkpoint(path, *trained, "other")
    assert str(path) in caught.value.message
    assert all(torch.equal(a, b) for a, b in zip(before, trained[0].parameters(), strict=True))


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named(trained, tmp_path, name):
    """A file cut short gives the folder's name and the way out."""
    path = save(tmp_path, trained, 3)
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(RunError, match="cannot be read") as caught:
        load_checkpoint(path, *trained, "f")
    assert str(path) in caught.value.message


@pytest.mark.parametrize("fault", ["optimizer", "rename", "full disk"])
def test_a_full_disk_leaves_the_older_checkpoints(trained, tmp_path, monkeypatch, fault):
    """Where writing or renaming fails, the error says so, nothing half-written stays and the older ones are whole.

    safetensors reports a full disk as an error of its own, which used to come through as a traceback.
    """
    old = save(tmp_path, trained, 3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if fault == "optimizer":
        monkeypatch.setattr(checkpoint, "save_file", full)
    elif fault == "rename":
        monkeypatch.setattr(checkpoint.os, "replace", full)
    with no_file_above(2000) if fault == "full disk" else nullcontext(), pytest.raises(RunError) as caught:
        save(tmp_path, trained, 4)
    assert "step-000004 could not be written" in caught.value.message
    assert ("File too large" if fault == "full disk" else "No space left on device") in caught.value.message
    assert "--resume" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    monkeypatch.undo()
    assert load_checkpoint(old, *trained, "f").step == 3


def test_state_says_where_training_stood(trained, tmp_path):
    """state.json can be read by people: progress and fingerprint."""
    state = json.loads((save(tmp_path, trained, 3) / "state.json").read_text(encoding="utf-8"))
    assert state["progress"]["step"] == 3
    assert state["fingerprint"] == "f"
