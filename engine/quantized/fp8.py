"""Float8 as DeepSeek and Qwen publish it: e4m3 numbers with a scale for each block of 128 x 128 (or for the whole).

weight[n, k] = float8[n, k] * weight_scale_inv[n // 128, k // 128]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.quantized.bits import scales_of
from inferfleet.kernels.quantized import Quantized


@dataclass(frozen=True)
class Fp8:
    """Weights stay as they are stored; a block's scale becomes one of each of its rows."""

    block: tuple[int, int] | None
    name = "fp8"
    members = frozenset({"weight", "weight_scale_inv", "weight_scale"})
    unused = frozenset({"input_scale", "activation_scale", "k_scale", "v_scale"})

    @classmethod
    def read(cls, fields: Fields) -> Fp8:
        fields.refuse("fmt", "e4m3", "float8_e4m3fn")
        size = fields.list_of(int, "weight_block_size", [])
        if size and (len(size) != 2 or min(size) < 1 or size[1] % 2):
            raise UnsupportedModel(f"{fields.where}: weight_block_size is {size}, not two numbers, the second even")
        return cls((size[0], size[1]) if size else None)

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Weight:
        stored = parts["weight"]
        if stored.dtype.itemsize > 1:
            return stored
        scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
        return float8(stored, scale, self.block)


def float8(stored: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Quantized:
    """A weight [N, K] of e4m3 numbers with its scales; ValueError for other numbers or shapes."""
    if stored.dtype is not torch.float8_e4m3fn or stored.dim() != 2:
        raise ValueError(f"a weight of {list(stored.shape)} {stored.dtype}, where a matrix of float8_e4m3fn is read")
    outputs, inputs = stored.shape
    scales, group = scales_of(scale, (outputs, inputs), block)
    return Quantized("fp8", inputs, group, stored.contiguous(), scales)
