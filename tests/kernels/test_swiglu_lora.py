"""SwiGLU with its thin products against float64, in the layout of the engine's buffers."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_rms_norm import draw
from test_swiglu import DTYPES, plain
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl
from deepdoctor.kernels.swiglu import swiglu_backward_, swiglu_forward
from deepdoctor.kernels.swiglu_lora import swiglu_lora_backward_, swiglu_lora_forward
from helpers_numeric import assert_no_less_accurate, run_with_gradients
from helpers_triton import DEVICE

RANKS = [(16, 16, 16), (4, 4, 4), (8, 0, 16), (0, 20, 3), (0, 0, 16), (16, 16, 0)]
SHAPES = [(0, 8), (1, 1), (7, 33), (65, 100)]


@dataclass
class Case:
    """Inputs, and buffers of nan as the engine has them: [act, u], [gate, up, v], and matrices with a border."""

    x: Tensor
    d_act: Tensor
    a: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    act: Tensor
    gate_up: Tensor

    @property
    def width(self) -> int:
        """F."""
        return self.x.shape[1] // 2

    @property
    def given(self) -> dict[str, Tensor]:
        """What swiglu_lora_forward is given."""
        end = self.width + self.a.shape[0]
        return {"a": self.a, "act": self.act[:, : self.width], "u": self.act[:, self.width : end]}

    def halves(self) -> tuple[Tensor, Tensor]:
        """gate_up with x in it, and v: 16 columns for each 16 begun."""
        self.gate_up.fill_(torch.nan)
        self.gate_up[:, : 2 * self.width] = self.x
        used = sum(b.shape[1] for b in (self.b_gate, self.b_up) if b is not None)
        end = 2 * self.width + -(-used // 16) * 16
        return self.gate_up[:, : 2 * self.width], self.gate_up[:, 2 * self.width : end]


def make(
    device: torch.device, shape: tuple[int, int], ranks: tuple[int, int, int], dtype: torch.dtype, gap: int = 0
) -> Case:
    """ranks: of gate, up and down; gap: columns of nan behind every row."""
    rows, width = shape
    r_gate, r_up, r = ranks
    matrix = torch.full((2 * width, 8 + r_gate + r_up + gap), torch.nan, device=device, dtype=dtype)
    b_gate, b_up = matrix[:width, 8 : 8 + r_gate], matrix[width:, 8 + r_gate : 8 + r_gate + r_up]
    a = torch.full((r, width + gap), torch.nan, device=device, dtype=dtype)[:, :width]
    for seed, view in enumerate((b_gate, b_up, a)):
        view.copy_(draw(*view.shape, dtype=dtype, seed=seed))
    return Case(
        2 * draw(rows, 2 * width, dtype=dtype, seed=3).to(device),
        draw(rows, width, dtype=dtype, seed=4).to(device),
        a,
        b_gate if r_gate else None,
        b_up if r_up else None,
        torch.full((rows, width + r + gap), torch.nan, device=device, dtype=dtype),
        torch.full((rows, 2 * width + -(-(r_gate + r_up) // 16) * 16 + gap), torch.nan, device=device, dtype=dtype),
    )


def check(impl: Impl, shape: tuple[int, int], ranks: tuple[int, int, int], dtype: torch.dtype, gap: int = 0) -> None:
    """act and its gradient bit for bit those of swiglu.py, u and v against float64, nothing written elsewhere."""
    case = make(DEVICE if impl == "triton" else torch.device("cpu"), shape, ranks, dtype, gap)
    width, given = case.width, case.given
    exact, exact_grad = run_with_gradients(plain, [case.x], case.d_act, torch.float64)
    reference, reference_grad = run_with_gradients(plain, [case.x], case.d_act)
    x = case.x.clone()

    swiglu_lora_forward(x, **given, impl=impl)
    act, u = given["act"].clone(), given["u"].clone()
    assert torch.equal(x, case.x)
    assert torch.equal(act, swiglu_forward(x, impl=impl))
    assert_no_less_accurate(u, reference @ case.a.T, exact @ case.a.T.double())
    assert case.act[:, width + ranks[2] :].isnan().all()

    expected = swiglu_backward_(case.x.clone(), case.d_act, impl=impl)
    d_act = case.d_act.clone()
    for names in ((), ("act",), ("act", "a", "u")):
        case.act.fill_(torch.nan)
        gate_up, v = case.halves()
        again = {name: given[name] for name in names}
        swiglu_lora_backward_(gate_up, d_act, case.b_gate, case.b_up, v=v, **again, impl=impl)
        assert torch.equal(gate_up, expected) and torch.equal(d_act, case.d_act)
        at = 0
        for b, half in ((case.b_gate, slice(0, width)), (case.b_up, slice(width, None))):
            if b is not None:
                truth = exact_grad[:, half] @ b.double()
                assert_no_less_accurate(v[:, at : at + b.shape[1]], reference_grad[:, half] @ b, truth)
                at += b.shape[1]
        assert not v[:, at:].any()
        assert case.gate_up[:, 2 * width + v.shape[1] :].isnan().all()
        assert torch.equal(given["act"], act) if "act" in names else given["act"].isnan().all()
        assert torch.equal(given["u"], u) if "u" in names else given["u"].isnan().all()
        assert case.act[:, width + ranks[2] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_against_swiglu_and_float64(shape, ranks, dtype) -> None:
    """The reference, for adapters on all, some and one of the three projections, padded columns among them."""
    for gap in (0, 3):
        check("torch", shape, ranks, dtype, gap)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gate_up": torch.zeros(2, 5)}, r"gate_up is \(2, 5\), expected \(T, 2F\)"),
        ({"d_act": torch.zeros(2, 3)}, r"d_act is \(2, 3\) .*, expected \(2, 4\)"),
        ({"b_gate": torch.zeros(3, 2)}, r"b_gate is \(3, 2\) .*, expected \(4, 2\)"),
        ({"b_up": torch.zeros(4)}, r"b_up is \(4,\) .*, expected \(4, 0\)"),
        ({"b_up": torch.zeros(2, 4).T}, r"b_up has strides \(1, 4\)"),
        ({"v": torch.zeros(2, 3)}, "v has 3 columns, expected at least 4"),
        ({"v": torch.zeros(3, 4)}, r"v is \(3, 4\) .*, expected \(2, 4\)"),
        ({"act": torch.zeros(2, 4, dtype=torch.float16)}, "act is .*float16 on cpu, expected .*float32"),
        ({"act": None}, "a, u and act go together"),
        ({"u": None}, "a, u and act go together"),
        ({"a": torch.zeros(2, 5)}, r"a is \(2, 5\) .*, expected \(2, 4\)"),
        ({"u": torch.zeros(2, 3)}, r"u is \(2, 3\) .*, expected \(2, 2\)"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_refuses(changed: dict[str, Any], said: str) -> None:
    """What does not fit is named with what was expected, and nothing is written."""
    given = {
        "gate_up": torch.ones(2, 8),
        "d_act": torch.ones(2, 4),
        "b_gate": torch.ones(4, 2),
        "b_up": torch.ones(4, 2),
        "v": torch.ones(2, 4),
        "act": torch.ones(2, 4),
        "a": torch.ones(2, 4),
        "u": torch.ones(2, 2),
    } | changed
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(KernelInputError, match=said):
        swiglu_lora_backward_(**given)
    forward = {name: given[name] for name in ("gate_up", "a", "act", "u")}
    if None not in forward.values() and {"gate_up", "a", "u"} & changed.keys():
        with pytest.raises(KernelInputError, match=said):
            swiglu_lora_forward(**forward)
    assert all(torch.equal(given[name], value) for name, value in before.items())
