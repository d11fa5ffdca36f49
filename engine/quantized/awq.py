"""AWQ in its "gemm" layout: words packed along the outputs, eight of four bits in an order of their own.

qweight [K, N/8] int32, qzeros [G, N/8] int32, scales [G, N]
weight[n, k] = scales[g, n] * (q[k, n] - z[g, n])        g = k // group
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.quantized.bits import numbers_of, zeros_of
from inferfleet.engine.quantized.scheme import bits_of, group_of
from inferfleet.kernels.quantized import Quantized, packed

#: Output j of a word's eight lies at this place in it: the even ones come first.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """Weights of four bits."""

    group: int | None
    name = "awq-int4"
    members = frozenset({"qweight", "qzeros", "scales"})
    unused = frozenset[str]()

    @classmethod
    def read(cls, fields: Fields) -> Awq:
        version = fields.text("version", "gemm").lower()
        if version != "gemm":
            raise UnsupportedModel(f"{fields.where}: version {version!r} of AWQ is not read, gemm is")
        fields.refuse("zero_point", True)
        bits_of(fields, "bits" if "bits" in fields else "w_bit", 4)
        return cls(group_of(fields if "group_size" in fields else _older(fields)))

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Weight:
        scales = parts["scales"].float().T.contiguous()
        inputs, outputs = len(parts["qweight"]), scales.shape[0]
        return Quantized(
            "int4",
            inputs,
            self.group or inputs,
            packed(_in_order(parts["qweight"], outputs).T.contiguous()),
            scales,
            zeros_of(_in_order(parts["qzeros"], outputs).T, 4),
        )


def _older(fields: Fields) -> Fields:
    """AutoAWQ's own files say q_group_size."""
    return Fields({"group_size": fields.values.get("q_group_size", -1)}, fields.where)


def _in_order(words: Tensor, outputs: int) -> Tensor:
    """[R, N/8] int32 -> [R, N] uint8."""
    mixed = numbers_of(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return mixed[:, :, torch.tensor(PLACES)].reshape(len(words), -1)[:, :outputs]
