"""Published bitsandbytes 4-bit checkpoints: their tensors as `NF4Weight` and back, and their config.json.

A quantised weight NAME is stored as these safetensors entries, the nested ones only with double quantisation:

NAME                                  packed indices, (ceil(n/2), 1) uint8, or the same bytes under another dtype
NAME.absmax                           block scales, (blocks,) fp32, or uint8 codes when double-quantised
NAME.quant_map                        the 16 values of the type, fp32
NAME.nested_absmax                    (ceil(blocks/256),) fp32
NAME.nested_quant_map                 the 256 values behind the codes, fp32
NAME.quant_state.bitsandbytes__nf4    JSON as uint8: quant_type, blocksize, dtype, shape, and with double
                                      quantisation nested_blocksize, nested_dtype, nested_offset
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import ModelError
from deepdoctor.kernels.nf4 import BLOCK_SIZES, NESTED_BLOCK_SIZE, NF4_CODE, NF4Weight

__all__ = ["BnbConfig", "check_bnb_config", "is_bnb_config", "quantized_names", "read_bnb_state", "write_bnb_state"]

STATE_PREFIX = ".quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNSUPPORTED_HINT = "give the 16-bit model instead; it is quantised to NF4 while it is read"
BROKEN_HINT = "the checkpoint is damaged or was edited; download it again"


@dataclass(frozen=True)
class BnbConfig:
    """What config.json says of a bitsandbytes NF4 checkpoint.

    double_quant: whether its block scales are 8-bit. skip_modules: modules it left in 16 bits, such as lm_head.
    """

    double_quant: bool
    skip_modules: tuple[str, ...]


def is_bnb_config(config_json: Mapping[str, Any]) -> bool:
    """Whether a model's config.json describes weights stored by bitsandbytes, 4-bit or 8-bit."""
    section = config_json.get("quantization_config")
    if not isinstance(section, Mapping):
        return False
    # Checkpoints of 2023 carry no quant_method.
    return section.get("quant_method", "bitsandbytes") == "bitsandbytes" and (
        "quant_method" in section or "load_in_4bit" in section or "load_in_8bit" in section
    )


def check_bnb_config(config_json: Mapping[str, Any]) -> BnbConfig:
    """Read `quantization_config` of a config.json for which `is_bnb_config` holds.

    Raises ModelError naming the key and its value where the weights are 8-bit or another 4-bit type than NF4.
    """
    if not is_bnb_config(config_json):
        found = config_json.get("quantization_config")
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ModelError(
            f"config.json: quantization_config.quant_method is {method!r}; expected 'bitsandbytes'", UNSUPPORTED_HINT
        )
    section = config_json["quantization_config"]

    def refuse(key: str, value: object, expected: str) -> ModelError:
        return ModelError(
            f"config.json: quantization_config.{key} is {value!r}; expected {expected}, bitsandbytes' NF4",
            UNSUPPORTED_HINT,
        )

    if section.get("load_in_8bit"):
        raise refuse("load_in_8bit", section["load_in_8bit"], "false with load_in_4bit true")
    if not section.get("load_in_4bit"):
        raise refuse("load_in_4bit", section.get("load_in_4bit"), "true")
    # bitsandbytes' own default where the key is absent.
    quant_type = section.get("bnb_4bit_quant_type", "fp4")
    if quant_type != "nf4":
        raise refuse("bnb_4bit_quant_type", quant_type, "'nf4'")
    return BnbConfig(
        double_quant=bool(section.get("bnb_4bit_use_double_quant", False)),
        skip_modules=tuple(section.get("llm_int8_skip_modules") or ()),
    )


def quantized_names(keys: Iterable[str]) -> list[str]:
    """The weights among a checkpoint's tensor names that bitsandbytes stored in 4 bits, of whatever type, in order."""
    return [key.partition(STATE_PREFIX)[0] for key in keys if STATE_PREFIX in key]


def read_bnb_state(tensors: Mapping[str, Tensor], name: str) -> NF4Weight:
    """Decode weight `name` of a bitsandbytes checkpoint; tensors are shared with the mapping, not copied.

    tensors: the entries listed above by full name; others may be present and are not touched.
    Raises ModelError naming tensor, value and expectation for another type than NF4, an unknown block size, a missing
    entry or a size that does not fit.
    """
    state = _quant_state(tensors, name)
    block_size, shape, dtype = _checked_state(state, name)
    n = math.prod(shape)
    blocks = -(-n // block_size)

    def entry(suffix: str, wanted: torch.dtype, numel: int) -> Tensor:
        tensor = _entry(tensors, name + suffix)
        if tensor.dtype != wanted or tensor.numel() != numel:
            raise ModelError(
                f"{name}{suffix} holds {tensor.numel()} values of {tensor.dtype}; "
                f"a weight of shape {shape} with block size {block_size} needs {numel} of {wanted}",
                BROKEN_HINT,
            )
        return tensor.reshape(-1)

    quant_map = entry(".quant_map", torch.float32, 16)
    if not torch.allclose(quant_map.cpu(), NF4_CODE, rtol=0, atol=1e-6):
        values = ", ".join(f"{value:.4g}" for value in quant_map.tolist())
        raise ModelError(f"{name}.quant_map is {values}; expected the 16 values of NF4", UNSUPPORTED_HINT)
    packed = _entry(tensors, name).contiguous().view(torch.uint8).reshape(-1, 1)
    if packed.numel() != (n + 1) // 2:
        raise ModelError(
            f"{name} holds {packed.numel()} bytes; a weight of shape {shape} in NF4 needs {(n + 1) // 2}", BROKEN_HINT
        )
    if f"{name}.nested_absmax" not in tensors:
        return NF4Weight(packed, shape, dtype, entry(".absmax", torch.float32, blocks), block_size)
    nested_block_size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested_block_size != NESTED_BLOCK_SIZE:
        raise _unsupported(name, "nested_blocksize", nested_block_size, str(NESTED_BLOCK_SIZE))
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise ModelError(f"{name}: nested_offset is {offset!r}; expected a finite number", BROKEN_HINT)
    return NF4Weight(
        packed,
        shape,
        dtype,
        entry(".absmax", torch.uint8, blocks),
        block_size,
        nested_absmax=entry(".nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK_SIZE)),
        nested_offset=torch.tensor(offset, dtype=torch.float32, device=packed.device),
        nested_code=entry(".nested_quant_map", torch.float32, 256),
    )


def write_bnb_state(weight: NF4Weight, name: str) -> dict[str, Tensor]:
    """The safetensors entries under which bitsandbytes stores weight as `name`, on weight's device.

    Returns the entries listed above. Tensors of weight are shared, except the 1 KiB map of the codes, which is copied
    because safetensors refuses one memory under two names.
    """
    device = weight.packed.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {
        name: weight.packed,
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": NF4_CODE.to(device, copy=True),
    }
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.nested_offset is not None
        state |= {
            "nested_blocksize": weight.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
        entries[f"{name}.nested_absmax"] = weight.nested_absmax
        entries[f"{name}.nested_quant_map"] = weight.nested_code.clone()
    text = json.dumps(state).encode("utf-8")
    entries[f"{name}{STATE_PREFIX}nf4"] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return entries


def _unsupported(name: str, key: str, value: object, supported: str) -> ModelError:
    return ModelError(f"{name}: {key} is {value!r}; supported: {supported}", UNSUPPORTED_HINT)


def _entry(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ModelError(f"the checkpoint has no tensor {key}, which a weight in NF4 needs", BROKEN_HINT)
    return tensors[key]


def _quant_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside weight `name`."""
    key = f"{name}{STATE_PREFIX}nf4"
    if key not in tensors:
        # The name tells the type; fp4 is the only other that bitsandbytes writes.
        if f"{name}{STATE_PREFIX}fp4" in tensors:
            raise _unsupported(name, "quant_type", "fp4", "nf4")
        raise ModelError(f"the checkpoint has no tensor {key}, which a weight in NF4 needs", BROKEN_HINT)
    try:
        state = json.loads(bytes(tensors[key].cpu().tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{key} is no JSON: {error}", BROKEN_HINT) from None
    if not isinstance(state, dict):
        raise ModelError(f"{key} holds {type(state).__name__}; expected a JSON object", BROKEN_HINT)
    return state


def _checked_state(state: dict[str, Any], name: str) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Block size, shape and dtype of weight `name`."""
    quant_type, block_size = state.get("quant_type"), state.get("blocksize")
    dtype, shape = state.get("dtype"), state.get("shape")
    if quant_type != "nf4":
        raise _unsupported(name, "quant_type", quant_type, "nf4")
    if block_size not in BLOCK_SIZES:
        raise _unsupported(name, "blocksize", block_size, ", ".join(map(str, BLOCK_SIZES)))
    if dtype not in DTYPES:
        raise _unsupported(name, "dtype", dtype, ", ".join(DTYPES))
    if not isinstance(shape, list) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ModelError(f"{name}: shape is {shape!r}; expected a list of positive sizes", BROKEN_HINT)
    return block_size, tuple(shape), DTYPES[dtype]
