"""GPTQ: words packed along the inputs, a zero and a scale for each group of them.

    qweight [K/p, N] int32, qzeros [G, N/p] int32, scales [G, N], g_idx [K]        p = 32 / bits numbers a word
    weight[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

The first version of the format stores z - 1 ("gptq"), the second z itself ("gptq_v2").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.quantized.bits import codes_of, numbers_of, sorted_by_group, zeros_of
from inferfleet.engine.quantized.scheme import bits_of, group_of
from inferfleet.kernels.quantized import Quantized


@dataclass(frozen=True)
class Gptq:
    """Weights of four or eight bits."""

    bits: int
    group: int | None
    #: What is added to a stored zero.
    zero_shift: int
    members = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    unused = frozenset[str]()

    @classmethod
    def read(cls, fields: Fields) -> Gptq:
        stored = fields.text("checkpoint_format", "gptq")
        if stored not in ("gptq", "gptq_v2"):
            raise UnsupportedModel(
                f"{fields.where}: checkpoint_format {stored!r} is not one of gptq, gptq_v2; convert the checkpoint"
            )
        if fields.values.get("dynamic"):
            raise UnsupportedModel(f"{fields.where}: dynamic gives modules bits of their own, which is not read")
        return cls(bits_of(fields, "bits", 4, 8), group_of(fields), 1 if stored == "gptq" else 0)

    @property
    def name(self) -> str:
        return f"gptq-int{self.bits}"

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Weight:
        words, scales = parts["qweight"], parts["scales"].float().T.contiguous()
        inputs, outputs = len(words) * 32 // self.bits, words.shape[1]
        zeros = numbers_of(parts["qzeros"], self.bits, outputs).T.to(scales.device)
        coded = Quantized(
            "int4" if self.bits == 4 else "int8",
            inputs,
            self.group or inputs,
            codes_of(words.T, self.bits, inputs),
            scales,
            zeros_of(zeros.short() + self.zero_shift, self.bits),
        )
        return sorted_by_group(coded, parts["g_idx"]) if "g_idx" in parts else coded
