"""Keys and values in 8 bits: what the blocks hold, how far the answers move, memory, refusals, CUDA graphs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_decoder import SIDES, draw_rows, random_adapter, tiny_pair

from deepdoctor.errors import ModelError, UsageError
from deepdoctor.kernels.paged_attention import as_indexed, quantize_heads
from deepdoctor.model import block_pool
from deepdoctor.model.block_pool import BLOCK, DTYPES, KVFormat, block_bytes, check_format, fitting_blocks
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.generate import Generator, Request
from deepdoctor.model.load import load_decoder
from deepdoctor.model.paged_runner import PagedRunner
from deepdoctor.model.runner import Prompt
from deepdoctor.model.sampling import Sampling
from deepdoctor.recipe import Recipe
from deepdoctor.session import Session
from deepdoctor.ui import SilentReporter
from helpers_models import save_tiny_model

FORMATS: tuple[KVFormat, ...] = ("fp8", "int8")
LENGTHS = (BLOCK + 1, 1, BLOCK, 2 * BLOCK + 3, BLOCK - 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny Qwen3 in fp32."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"), "qwen3")[0]


def decoded(runner: PagedRunner, steps: int = 8) -> torch.Tensor:
    """Logits (steps, n, V) after given tokens, from prompts of LENGTHS on both sides."""
    runner.add([Prompt(tuple(row), SIDES[n % 2]) for n, row in enumerate(draw_rows(*LENGTHS, seed=8))])
    added = draw_rows(*[steps] * len(LENGTHS), seed=9)
    return torch.stack([runner.decode(tokens).float().clone() for tokens in zip(*added, strict=True)])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_the_blocks_hold(tiny: Decoder, kv_format: KVFormat) -> None:
    """Of prompts and of new tokens, the first layer holds exactly the rounded keys and values of a plain cache."""
    adapter = random_adapter(tiny).eval()
    runners = [PagedRunner(tiny, adapter, 5, 200, kv_format=of) for of in ("auto", kv_format)]
    for runner in runners:
        decoded(runner)
    plain, small = (runner.cache for runner in runners)
    assert small.absmax is not None and plain.absmax is None
    for slot in runners[0].slots:
        for number, block in enumerate(slot.blocks):
            filled = min(slot.length - number * BLOCK, BLOCK)
            codes, absmax = quantize_heads(plain.kv[0, :, block, :, :filled], DTYPES[kv_format])
            assert torch.equal(as_indexed(small.kv)[0, :, block, :, :filled], as_indexed(codes))
            assert torch.equal(small.absmax[0, :, block, :, :filled], absmax)


def test_how_far_logits_move(tiny: Decoder) -> None:
    """After the prompt nothing moves; along the same tokens int8 stays within 1 % of plain logits, fp8 within 5 %."""
    adapter = random_adapter(tiny).eval()
    plain, fp8, int8 = (decoded(PagedRunner(tiny, adapter, 5, 200, kv_format=of)) for of in ("auto", *FORMATS))
    size = plain.square().mean().sqrt()
    far = [float((found - plain).square().mean().sqrt() / size) for found in (fp8, int8)]
    assert 0 < far[1] < 0.01 and far[1] < far[0] < 0.05
    prompts = [Prompt(tuple(row)) for row in draw_rows(*LENGTHS, seed=8)]
    first, second = (PagedRunner(tiny, adapter, 5, 200, kv_format=of).add(prompts) for of in ("auto", "fp8"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_greedy_answers(tiny: Decoder, kv_format: KVFormat) -> None:
    """At least half the greedy tokens of a random model stay, and two refilled slots answer as five do."""
    adapter = random_adapter(tiny).eval()
    prompts = draw_rows(*LENGTHS, seed=8)
    requests = [Request(p, Sampling(20), SIDES[n % 2], n) for n, p in enumerate(prompts)]

    def answers(of: KVFormat, slots: int = 16) -> dict[Any, list[int]]:
        generator = Generator(tiny, adapter, (), slots, runner="paged", kv_format=of)
        return {c.request.key: c.ids for c in generator.run(requests)}

    plain, found = answers("auto"), answers(kv_format)
    equal = [sum(a == b for a, b in zip(plain[n], found[n], strict=True)) for n in range(len(prompts))]
    assert sum(equal) >= 0.5 * 20 * len(prompts)
    assert answers(kv_format, slots=2) == found


@pytest.mark.parametrize("kv_format", FORMATS)
def test_equal_prompts_share_and_copy(tiny: Decoder, kv_format: KVFormat) -> None:
    """A block that is copied brings its scales along: equal prompts go on with equal logits."""
    prompt = Prompt(tuple(draw_rows(BLOCK + 3, seed=4)[0]))
    runner = PagedRunner(tiny, None, 3, 4 * BLOCK, kv_format=kv_format)
    runner.add([prompt] * 3)
    found = runner.decode([5, 5, 5])
    torch.testing.assert_close(found, found[:1].expand(3, -1))
    assert runner.slots[0].blocks[1] != runner.slots[1].blocks[1]


def test_the_memory_is_half(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of an 8B model takes 8 MiB in 16 bits, 4.125 in 8; the planner fits as many more, the cache has them."""
    shape: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256}
    shape |= {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072}
    config = replace(tiny.config, **shape)
    for kv_format, mib in (("auto", 8), ("fp8", 4.125), ("int8", 4.125)):
        assert block_bytes(config, torch.bfloat16, kv_format) == mib * 2**20
    decoder: Any = SimpleNamespace(config=config, compute_dtype=torch.bfloat16, device=torch.device("cuda"), layers=[])
    monkeypatch.setattr(block_pool, "free_memory", lambda device: 12 * 2**30)
    plain, small = (fitting_blocks(decoder, 64, 8192, kv_format=of) for of in ("auto", "fp8"))
    assert plain > 1000 and small == pytest.approx(plain * 8 / 4.125, abs=2)
    for kv_format in FORMATS:
        cache = PagedRunner(tiny, None, 2, 3 * BLOCK, kv_format=kv_format).cache
        assert cache.absmax is not None
        held = cache.kv.nbytes + cache.absmax.nbytes
        assert held == 6 * block_bytes(tiny.config, torch.float32, kv_format)


def test_refusals(tiny: Decoder, tiny_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without it, a runner without it and a vLLM server each say so; a run learns before it loads the base."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    check_format("auto", cpu)
    with pytest.raises(ModelError, match=r"compare.kv_cache is int8, which needs a GPU; this device is cpu"):
        check_format("int8", cpu, "compare.kv_cache")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check_format("int8", gpu)
    with pytest.raises(ModelError, match="fp8, but Tesla T4 cannot convert fp8") as raised:
        check_format("fp8", gpu, "ask.kv_cache")
    assert raised.value.hint == "use `--ask.kv_cache int8`, or auto"
    with pytest.raises(UsageError, match="only the paged runner"):
        list(Generator(tiny, None, (), kv_format="fp8").run([Request([1], Sampling(2))]))
    run = {"model": {"id": str(tiny_r1), "device": "cpu"}, "data": {"source": "embedded:rows"}}
    recipe = Recipe.model_validate({**run, "compare": {"kv_cache": "fp8"}})
    with pytest.raises(ModelError, match=r"compare.kv_cache is fp8"):
        _ = Session(recipe, None, SilentReporter()).decoder
    vllm = {"engine": "vllm", "vllm_url": "http://127.0.0.1:1", "kv_cache": "fp8"}
    with pytest.raises(ValueError, match="kv-cache-dtype"):
        Recipe.model_validate({**run, "compare": vllm})


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
@torch.inference_mode()
def test_on_a_gpu(tmp_path: Path, precision: str, kv_format: KVFormat) -> None:
    """Graphs give the logits of running without them, and those of the plain cache to the format's rounding."""
    save_tiny_model(tmp_path, "llama", hidden_size=256, intermediate_size=384)
    decoder = load_decoder(tmp_path, precision, "cuda")
    adapter = random_adapter(decoder).eval().to("cuda")
    made = [PagedRunner(decoder, adapter, 5, 200, graphs=graphs, kv_format=kv_format) for graphs in (True, False)]
    graphed, eager, plain = (decoded(runner) for runner in (*made, PagedRunner(decoder, adapter, 5, 200)))
    size = plain.square().mean().sqrt()
    assert (graphed - eager).square().mean().sqrt() <= 3e-3 * size
    assert 0 < (graphed - plain).square().mean().sqrt() <= 5e-2 * size
