"""Our coded weights as the tensors of a compressed-tensors module, and the rules that a config.json has for them.

int8 and int4 become pack-quantized (32-bit words, numbers without a sign), fp8 becomes float-quantized. This is the way
back from what compressed.py reads; which weights are coded, and in which file they go, is not its business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inferfleet.kernels.quantized import Kind, Quantized, packed


def tensors_of(weight: Quantized) -> dict[str, Tensor]:
    """Last parts of names -> tensors. Scales are numbers that bfloat16 holds, so two bytes lose nothing."""
    scales = weight.scales.to(torch.bfloat16)
    if weight.kind == "fp8":
        return {"weight": weight.codes.contiguous(), "weight_scale": scales}
    found = {
        "weight_packed": words_of(weight.codes.view(torch.uint8) ^ (128 if weight.kind == "int8" else 0)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        # Zeros lie packed along the outputs.
        found["weight_zero_point"] = words_of(packed(weight.zeros.T.to(torch.uint8))).T.contiguous()
    return found


def words_of(raw: Tensor) -> Tensor:
    """[R, B] bytes -> [R, B/4 rounded up] int32."""
    whole = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4))
    # A copy, because one row may count as contiguous with strides that no view takes.
    return whole.clone(memory_format=torch.contiguous_format).view(torch.int32)


def quantization_config(kind: Kind, groups: Mapping[str, int], plain: list[str]) -> dict[str, Any]:
    """For config.json. groups: coded module -> inputs of a group; plain: modules of products that stay as they are."""
    rules: dict[str, Any] = {}
    sizes = sorted(set(groups.values()), reverse=True) if kind == "int4" else [0]
    for number, size in enumerate(sizes):
        # The first rule is for all that no other names.
        names = {name for name in groups if number and groups[name] == size}
        targets = _patterns(names, set(groups) - names) if names else ["Linear"]
        rules[f"group_{number}"] = {
            "targets": targets,
            "weights": _rule(kind, size),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": rules,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
    }


def _rule(kind: Kind, group: int) -> dict[str, Any]:
    return {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": kind != "int4",
        "strategy": "group" if kind == "int4" else "channel",
        "group_size": group if kind == "int4" else None,
        "dynamic": False,
    }


def _patterns(names: set[str], others: set[str]) -> list[str]:
    """Expressions for module names, any number for the numbers in them where that catches none of the others."""
    foreign = {_pattern(name) for name in others}
    return sorted({name if (pattern := _pattern(name)) in foreign else f"re:{pattern}$" for name in names})


def _pattern(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
