"""Shared by all tests: quiet threads, offline Hub, real data where it is there, tiny models."""

import os
import warnings
from pathlib import Path

# Before torch starts its threads: on a busy host spinning threads make a run ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

SHARED = Path(os.environ.get("DEEPDOCTOR_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def cuda_ready() -> None:
    """The first product in a backward thread warns that it sets the CUDA context; have that over with."""
    import torch

    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.ones(8, 8, device="cuda", requires_grad=True)
            (x @ x).sum().backward()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows, questions and model outputs; it is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real data (DEEPDOCTOR_TEST_DATA, else ../shared/data) is not there")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the embedded model, converted once into the user's cache."""
    from deepdoctor.errors import ModelError
    from deepdoctor.model.embedded import embedded_model

    try:
        return embedded_model()
    except ModelError as error:
        pytest.skip(f"the embedded model is not installed: {error.message}")


@pytest.fixture(scope="session")
def tiny_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with an R1-style tokenizer: a whole model folder in a few hundred kB."""
    from helpers_models import save_tiny_model
    from helpers_tokenizer import build_r1_tokenizer

    folder = tmp_path_factory.mktemp("tiny-r1")
    build_r1_tokenizer(folder)
    advice = (folder / "generation_config.json").read_text(encoding="utf-8")
    save_tiny_model(folder, "llama", vocab_size=640)
    (folder / "generation_config.json").write_text(advice, encoding="utf-8")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests with a reason where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
