"""An embedding and a head that stay in host memory: the same answers, other bytes on the device."""

from pathlib import Path

import pytest
import torch
from helpers_decoder import draw_rows

from deepdoctor.model.decoder import Decoder, PackedAttention
from deepdoctor.model.fast_decode import DecodeStep
from deepdoctor.model.load import load_decoder
from helpers_models import save_tiny_model

ROWS = draw_rows(5, 1, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder; its head is not its embedding."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, "llama")
    return folder


def test_embedding_stays_with_a_cpu_decoder(saved: Path) -> None:
    """On a CPU, host memory is the device: nothing moves, and all bytes are the device's."""
    decoder = load_decoder(saved, "fp32", embedding_on_host=True)
    embedding, head = decoder.embedding, decoder.head
    for on_host in (True, False):
        decoder.place_embedding(on_host)
        decoder.place_head(on_host)
    assert decoder.embedding is embedding and decoder.head is head
    assert decoder.device_nbytes == decoder.nbytes
    ids = torch.tensor([3, 0, 639, 3])
    assert torch.equal(decoder.embed(ids), embedding[ids])


@pytest.mark.parametrize("rows", [None, 1, 100, 640, 10_000])
def test_head_in_parts(saved: Path, rows: int | None) -> None:
    """The pieces put together are the head, each of the rows asked for, views where it is on the device."""
    decoder = load_decoder(saved, "fp32")
    pieces = [part() for part in decoder.head_parts(rows)]
    assert torch.equal(torch.cat(pieces), decoder.head)
    assert all(len(piece) == min(rows or 640, 640) for piece in pieces[:-1])
    assert pieces[0].data_ptr() == decoder.head.data_ptr()


def test_matrices_away_from_the_device(saved: Path) -> None:
    """A decoder elsewhere counts an embedding and a head on the host apart, and fetches what it needs of them."""
    decoder = load_decoder(saved, "fp32")
    whole = decoder.nbytes
    decoder.norm = decoder.norm.to("meta")
    assert decoder.device_nbytes == whole - 2 * 640 * 64 * 4
    x = decoder.embed(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert x.device.type == "meta" and x.shape == (3, 2, 64)
    pieces = [part() for part in decoder.head_parts(200)]
    assert [len(piece) for piece in pieces] == [200, 200, 200, 40] and pieces[3].device.type == "meta"
    assert decoder.logits(x).shape == (3, 2, 640)
    decoder.place_head(False)
    assert decoder.head.device.type == "meta" and decoder.embedding.device.type == "cpu"


def gpu_logits(decoder: Decoder) -> torch.Tensor:
    """Logits (T, V) of the rows, packed, on the decoder's device."""
    ids = torch.tensor([token for row in ROWS for token in row], device=decoder.device)
    places = torch.cat([torch.arange(len(row)) for row in ROWS]).to(decoder.device)
    attend = PackedAttention(decoder.config.num_kv_heads, [len(row) for row in ROWS])
    with torch.no_grad():
        return decoder.logits(decoder(ids, places, attend))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_embedding_and_head_on_the_host(tmp_path: Path, precision: str) -> None:
    """With the embedding in pinned host memory the logits are the same bits; with the head there too, to rounding."""
    save_tiny_model(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    here, there = load_decoder(tmp_path, precision, "cuda"), load_decoder(tmp_path, precision, "cuda")
    there.place_embedding(True)
    loaded = load_decoder(tmp_path, precision, "cuda", embedding_on_host=True)
    matrix = here.embedding.nbytes
    for decoder in (there, loaded):
        assert decoder.embedding.device.type == "cpu" and decoder.embedding.is_pinned()
        assert decoder.nbytes == here.nbytes == here.device_nbytes == decoder.device_nbytes + matrix
        assert torch.equal(gpu_logits(decoder), gpu_logits(here))
    ids = torch.tensor([3, 0, 639], device="cuda")
    assert torch.equal(loaded.embed(ids), here.embed(ids)) and torch.equal(loaded.embed(ids.cpu()), here.embed(ids))
    loaded.place_head(True)
    assert loaded.head.is_pinned() and loaded.device_nbytes == here.nbytes - 2 * matrix
    for rows in (None, 7, 640):
        for _ in range(2):
            assert torch.equal(torch.cat([part() for part in loaded.head_parts(rows)]), here.head)
    torch.testing.assert_close(gpu_logits(loaded), gpu_logits(here), atol=2e-2, rtol=2e-2)
    places = torch.zeros(3, dtype=torch.int64, device="cuda")
    steps = [DecodeStep(decoder, None) for decoder in (here, loaded)]
    one, other = (step(ids, places, lambda layer, qkv: qkv[:, :4]) for step in steps)
    torch.testing.assert_close(other, one, atol=2e-2, rtol=2e-2)
    loaded.place_embedding(False)
    loaded.place_head(False)
    assert torch.equal(loaded.embedding, here.embedding) and torch.equal(loaded.head, here.head)
    assert loaded.device_nbytes == loaded.nbytes == here.nbytes


@pytest.mark.gpu
def test_a_tied_embedding_stays_on_the_gpu(tmp_path: Path) -> None:
    """Where the head is the embedding, both stay on the GPU, whatever is asked."""
    save_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    decoder = load_decoder(tmp_path, "bf16", "cuda", embedding_on_host=True)
    decoder.place_embedding(True)
    decoder.place_head(True)
    assert decoder.head is decoder.embedding and decoder.embedding.is_cuda
