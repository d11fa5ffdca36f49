"""A weight as small codes with a scale for each group of inputs, and how a plain weight becomes one.

    weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]        g = k // group, the last group may be shorter

    int8    codes -128..127; zero is 0 unless `zeros` says otherwise
    int4    codes 0..15, two inputs to a byte, the even one in the low half; zero is 8 unless `zeros` says otherwise
    fp8     codes are float8 e4m3 numbers and have no zero

Every format that checkpoints bring (one scale a matrix, a row, a block or a group) is a case of this one, so there is
one product for all. This file knows numbers only: products are in quantized_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "int4", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "int4", "fp8")

#: Inputs that share a scale of int4, and what they are where a row would have too few groups to pay for the large ones.
INT4_GROUP, INT4_SMALL_GROUP = 128, 32
INT4_SMALL_INPUTS = 1024
FP8_LARGEST = 448.0
#: Elements that are held in float32 at a time while a weight is coded or decoded.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Quantized:
    """A coded weight [outputs, inputs]."""

    kind: Kind
    inputs: int
    #: Inputs that share a scale.
    group: int
    #: int8: [N, K] int8; int4: [N, (K+1)//2] uint8; fp8: [N, K] float8_e4m3fn.
    codes: Tensor
    #: [N, G] float32.
    scales: Tensor
    #: [N, G] int16, or None for the kind's own.
    zeros: Tensor | None = None
    #: Column k of the codes is input order[k]; None where they lie in their order.
    order: Tensor | None = None

    def __post_init__(self) -> None:
        groups = -(-self.inputs // self.group)
        width = (self.inputs + 1) // 2 if self.kind == "int4" else self.inputs
        outputs = self.codes.shape[0]
        shapes = [tuple(t.shape) for t in (self.codes, self.scales, self.zeros) if t is not None]
        if shapes != [(outputs, width), *[(outputs, groups)] * (len(shapes) - 1)]:
            raise ValueError(
                f"{self.kind} in groups of {self.group} over {self.inputs} inputs does not lie as {shapes}"
            )
        if self.group % 2 and groups > 1:
            raise ValueError(f"a group of {self.group} inputs: several groups must be even")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.order) if t is not None)

    def to(self, device: torch.device) -> Quantized:
        moved = [None if t is None else t.to(device) for t in (self.codes, self.scales, self.zeros, self.order)]
        assert moved[0] is not None and moved[1] is not None
        return replace(self, codes=moved[0], scales=moved[1], zeros=moved[2], order=moved[3])

    def rows(self, index: slice) -> Quantized:
        """Some of the outputs, over the same memory."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)

    def columns(self, begin: int, end: int) -> Quantized | None:
        """Some of the inputs, in memory of their own; None where codes or groups do not come apart there."""
        is_all = (begin, end) == (0, self.inputs)
        if not is_all and (self.order is not None or not self._can_part(begin) or not self._can_part(end)):
            return None
        per_byte = 2 if self.kind == "int4" else 1
        group, groups = self.group, slice(begin // self.group, -(-end // self.group))
        if self.scales.shape[1] == 1:
            group, groups = end - begin, slice(None)
        return replace(
            self,
            inputs=end - begin,
            group=group,
            codes=self.codes[:, begin // per_byte : -(-end // per_byte)].clone(),
            scales=self.scales[:, groups].clone(),
            zeros=None if self.zeros is None else self.zeros[:, groups].clone(),
        )

    def _can_part(self, index: int) -> bool:
        """Whether the inputs before this one share neither a byte nor, where there are several, a group with it."""
        unit = self.group if self.scales.shape[1] > 1 else 2 if self.kind == "int4" else 1
        return index == self.inputs or index % unit == 0

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain weight [N, K], each number rounded once."""
        plain = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for index in row_chunks(*self.shape):
            plain[index] = _decoded(self.rows(index))
        return plain


def joined(parts: Sequence[Quantized]) -> Quantized | None:
    """The parts one under another as one weight, or None where their formats differ."""
    first = parts[0]
    if any(not _alike(first, part) for part in parts[1:]):
        return None
    if len(parts) == 1:
        return first
    zeros = None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    # Bytes, because torch joins no float8 everywhere.
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype)
    return replace(first, codes=codes, scales=torch.cat([part.scales for part in parts]), zeros=zeros)


def _alike(a: Quantized, b: Quantized) -> bool:
    if (a.kind, a.inputs, a.group, a.zeros is None, a.order is None) != (
        *(b.kind, b.inputs, b.group),
        *(b.zeros is None, b.order is None),
    ):
        return False
    return a.order is None or b.order is None or torch.equal(a.order, b.order)


def row_chunks(outputs: int, inputs: int) -> Iterator[slice]:
    """Slices over the outputs of about CHUNK_ELEMENTS numbers each."""
    step = max(1, CHUNK_ELEMENTS // max(inputs, 1))
    for begin in range(0, outputs, step):
        yield slice(begin, min(begin + step, outputs))


def unpacked(codes: Tensor, inputs: int) -> Tensor:
    """int4 codes [N, (K+1)//2] uint8 -> [N, K] uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)[:, :inputs]


def packed(codes: Tensor) -> Tensor:
    """int4 codes [N, K] uint8 below 16 -> [N, (K+1)//2] uint8."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    if even.shape[1] > odd.shape[1]:
        odd = torch.nn.functional.pad(odd, (0, 1))
    return even | (odd << 4)


def _decoded(weight: Quantized) -> Tensor:
    codes = unpacked(weight.codes, weight.inputs) if weight.kind == "int4" else weight.codes
    values = codes.float()
    if weight.zeros is not None:
        values -= _spread(weight.zeros.float(), weight.group, weight.inputs)
    elif weight.kind == "int4":
        values -= 8
    values *= _spread(weight.scales, weight.group, weight.inputs)
    if weight.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.order, values)


def _spread(of_groups: Tensor, group: int, inputs: int) -> Tensor:
    """[N, G] -> [N, K] (or [N, 1], which means the same)."""
    return of_groups if of_groups.shape[1] == 1 else of_groups.repeat_interleave(group, dim=1)[:, :inputs]


def quantise(weight: Tensor, kind: Kind) -> Quantized:
    """weight [N, K] of any float dtype -> its codes; each row's depend on that row alone.

    int8 and fp8 have one scale a row. int4 has a scale and a zero a group: with so few levels, those that a skewed
    group would not use are missed. Scales are numbers that bfloat16 holds, so that a file can have them in two bytes.
    """
    outputs, inputs = weight.shape
    coder = {"int8": _to_int8, "int4": _to_int4, "fp8": _to_fp8}[kind]
    parts = [coder(weight[index].float()) for index in row_chunks(outputs, inputs)]
    whole = joined(parts)
    assert whole is not None, "one coder makes one format"
    return whole


def quantised_bytes(outputs: int, inputs: int, kind: Kind) -> int:
    """The memory of what `quantise` makes of such a weight."""
    if kind == "int4":
        return outputs * ((inputs + 1) // 2 + -(-inputs // _int4_group(inputs)) * (4 + 2))
    return outputs * (inputs + 4)


def _int4_group(inputs: int) -> int:
    return INT4_GROUP if inputs >= INT4_SMALL_INPUTS else INT4_SMALL_GROUP


def _to_int8(weight: Tensor) -> Quantized:
    scales = _scale(weight.abs().amax(dim=1, keepdim=True), 127)
    codes = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
    return Quantized("int8", weight.shape[1], weight.shape[1], codes, scales)


def _to_fp8(weight: Tensor) -> Quantized:
    scales = _scale(weight.abs().amax(dim=1, keepdim=True), FP8_LARGEST)
    codes = (weight / scales).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return Quantized("fp8", weight.shape[1], weight.shape[1], codes, scales)


def _to_int4(weight: Tensor) -> Quantized:
    outputs, inputs = weight.shape
    group = _int4_group(inputs)
    groups = -(-inputs // group)
    short = groups * group - inputs
    # Zeros past the end change neither the smallest nor the largest number of a group: both include zero anyway.
    grouped = torch.nn.functional.pad(weight, (0, short)).view(outputs, groups, group)
    lowest = grouped.amin(dim=2).clamp_(max=0)
    scales = _scale(grouped.amax(dim=2).clamp_(min=0) - lowest, 15)
    zeros = (-lowest / scales).round_().clamp_(0, 15)
    codes = (grouped / scales.unsqueeze(2) + zeros.unsqueeze(2)).round_().clamp_(0, 15)
    codes = codes.view(outputs, -1)[:, :inputs].to(torch.uint8)
    return Quantized("int4", inputs, group, packed(codes), scales, zeros.to(torch.int16))


def _scale(span: Tensor, levels: float) -> Tensor:
    """span / levels, 1 where there is no span; a NaN stays one, so that a spoiled row is still seen in its results."""
    scales = (span / levels).to(torch.bfloat16).float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)
