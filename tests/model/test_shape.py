"""A model's shape without its weights: from the Hub only small files come, and what is here is not asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepdoctor.errors import HubError, ModelError, UnsupportedModelError
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.load import resolve_model
from deepdoctor.model.shape import cached_model, model_shape
from helpers_gguf import write_gguf
from helpers_hub import WRITE, File, LocalHub, Repo, git_blob, local_hub
from helpers_models import tiny_model
from helpers_run import call, tiny_recipe, write_recipe

NAME = "somebody/else-8b"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub that can be asked, with an empty cache."""
    from huggingface_hub import constants

    with local_hub(tmp_path / "hub") as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield found


def publish(hub: LocalHub, folder: Path, name: str = NAME, without: tuple[str, ...] = (), **more: str) -> Repo:
    """Put a model folder's files, and texts by name, into a repository."""
    files = {}
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}
    for path, data in (contents | {key.replace("__", "."): text.encode() for key, text in more.items()}).items():
        (hub.folder / "git" / git_blob(data)).write_bytes(data)
        files[path] = File(git_blob(data), len(data))
    hub.repos["model", name] = repo = Repo(name, "model", False)
    repo.commit(files, "model")
    return repo


def fetched(hub: LocalHub) -> set[str]:
    """Names of the files that were asked for."""
    return {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path}


def test_only_config_and_index_are_asked_for(hub: LocalHub, tiny_r1: Path) -> None:
    """A plan used to download the whole model; the index gives the size of what a run would download."""
    index = json.dumps({"metadata": {"total_size": 123_456_789}, "weight_map": {"a": "model-1.safetensors"}})
    publish(hub, tiny_r1, **{"model__safetensors__index__json": index})
    found = model_shape(NAME)
    assert found.config == ModelConfig.from_folder(tiny_r1)
    assert found.download_bytes == 123_456_789
    assert fetched(hub) == {"config.json", "model.safetensors.index.json"}
    asked = len(hub.requests)
    assert model_shape(NAME, ask_hub=False).config == found.config, "the second time it comes from the cache"
    assert model_shape(NAME).download_bytes == found.download_bytes
    assert len(hub.requests) == asked
    assert cached_model(NAME, None) is None, "a config alone is no model"


def test_without_an_index_the_size_is_reckoned(hub: LocalHub, tiny_r1: Path) -> None:
    """One file of weights has no index: parameters times the width of their dtype."""
    publish(hub, tiny_r1)
    found = model_shape(NAME)
    real = (tiny_r1 / "model.safetensors").stat().st_size
    assert found.download_bytes == pytest.approx(real, rel=0.02)
    assert "model.safetensors" not in fetched(hub)


def test_a_pinned_revision_is_asked_for(hub: LocalHub, tiny_r1: Path) -> None:
    """The commit's own config counts, not the branch's."""
    first = publish(hub, tiny_r1).head
    repo = hub.repo(NAME)
    changed = json.loads((tiny_r1 / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 5}
    data = json.dumps(changed).encode()
    (hub.folder / "git" / git_blob(data)).write_bytes(data)
    repo.commit({**repo.files, "config.json": File(git_blob(data), len(data))}, "more layers")
    assert model_shape(NAME, first).config.num_layers == 2
    assert model_shape(NAME).config.num_layers == 5


def test_a_whole_model_in_the_cache_needs_no_download(hub: LocalHub, tiny_r1: Path) -> None:
    """After a run the plan says that nothing is to come, and asks nobody."""
    publish(hub, tiny_r1)
    resolve_model(NAME)
    asked = len(hub.requests)
    found = model_shape(NAME)
    assert (found.download_bytes, found.config) == (0, ModelConfig.from_folder(tiny_r1))
    assert len(hub.requests) == asked


def test_what_the_hub_does_not_have(hub: LocalHub, tiny_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such model, a model without config, another architecture, no network: each says so."""
    with pytest.raises(HubError, match="could not be fetched") as caught:
        model_shape("nobody/nothing")
    assert "deepdoctor login" in str(caught.value.hint)
    publish(hub, tiny_r1, "somebody/bare", without=("config.json",))
    with pytest.raises(ModelError, match=r"has no config\.json on the Hub"):
        model_shape("somebody/bare")
    publish(hub, tiny_r1, "somebody/other", config__json='{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        model_shape("somebody/other")
    with pytest.raises(ModelError, match="no Hub id"):
        model_shape("./nowhere")
    with pytest.raises(HubError, match="not known here"):
        model_shape("somebody/third", ask_hub=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="could not be fetched"):
        model_shape("somebody/third")


def test_local_shapes(tmp_path: Path, tiny_r1: Path) -> None:
    """A folder, a .gguf file (whose tensors used to be read for it), and the embedded model."""
    assert model_shape(str(tiny_r1)).config == ModelConfig.from_folder(tiny_r1)
    write_gguf(tmp_path / "model.gguf", "llama", tiny_model("llama"), "Q8_0")
    found = model_shape(str(tmp_path / "model.gguf"))
    assert (found.config.num_layers, found.config.hidden_size, found.download_bytes) == (2, 64, 0)
    embedded = model_shape("embedded:smollm2-135m-instruct")
    assert (embedded.config.num_layers, embedded.download_bytes) == (30, 0)
    assert model_shape("unsloth/DeepSeek-R1-Distill-Llama-8B-bnb-4bit").is_nf4


@pytest.mark.parametrize("words", [["plan"], ["run", "--dry-run"]])
def test_plan_and_dry_run_fetch_no_weights(
    hub: LocalHub, tiny_r1: Path, tmp_path: Path, capsys: Any, words: list[str]
) -> None:
    """Both commands on a model whose shape nobody here knows."""
    publish(hub, tiny_r1)
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(Path(NAME), tmp_path))
    outcome = call(capsys, words[0], path, *words[1:])
    assert outcome.code == 0, outcome.err
    assert f"shape from {NAME}'s config.json; no weights were fetched" in outcome.out
    assert fetched(hub) == {"config.json", "model.safetensors.index.json"}
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors")]
