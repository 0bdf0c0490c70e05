"""Which number format is held and computed in."""

import pytest
import torch

from deepdoctor.errors import ModelError
from deepdoctor.model import precision
from deepdoctor.model.precision import cpu_matmul_gflops, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def set_speeds(monkeypatch: pytest.MonkeyPatch, bf16: float, fp32: float) -> None:
    """Pretend a CPU multiplies this fast, GFLOP/s."""
    monkeypatch.setattr(precision, "cpu_matmul_gflops", lambda: {BF16: bf16, FP32: fp32})


@pytest.mark.parametrize(("bf16", "fp32", "name", "dtype"), [(600, 100, "bf16", BF16), (40, 90, "fp32", FP32)])
def test_a_cpu_takes_the_faster_format(
    monkeypatch: pytest.MonkeyPatch, bf16: float, fp32: float, name: str, dtype: torch.dtype
) -> None:
    """auto holds and computes in what multiplies faster; nf4 computes in it; a named precision is taken at its word."""
    set_speeds(monkeypatch, bf16, fp32)
    assert resolve_precision("auto", CPU) == (name, dtype)
    assert resolve_precision("nf4", CPU) == ("nf4", dtype)
    for named, wanted in (("bf16", BF16), ("fp16", FP16), ("fp32", FP32)):
        assert resolve_precision(named, CPU) == (named, wanted)


def test_a_named_compute_dtype_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller names the dtype of activations, auto and nf4 follow it."""
    set_speeds(monkeypatch, 600, 100)
    assert resolve_precision("nf4", CPU, FP32) == ("nf4", FP32)
    assert resolve_precision("auto", CPU, FP16) == ("fp16", FP16)


def test_a_gpu_follows_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 from compute capability 8 on, fp16 before; asking an older card for bf16 names card and remedy."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert resolve_precision("auto", CUDA) == ("bf16", BF16)
    assert resolve_precision("nf4", CUDA) == ("nf4", BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert resolve_precision("auto", CUDA) == ("fp16", FP16)
    assert resolve_precision("nf4", CUDA) == ("nf4", FP16)
    assert resolve_precision("fp32", CUDA) == ("fp32", FP32)
    with pytest.raises(ModelError, match=r"model\.precision is bf16, but Tesla T4 has no bf16 arithmetic") as caught:
        resolve_precision("bf16", CUDA)
    assert caught.value.hint == "use nf4 or fp16"


def test_the_measurement_measures() -> None:
    """Both formats get a plausible speed, measured once."""
    speeds = cpu_matmul_gflops()
    assert set(speeds) == {BF16, FP32}
    assert all(0.1 < speed < 1e5 for speed in speeds.values())
    assert cpu_matmul_gflops() is speeds
