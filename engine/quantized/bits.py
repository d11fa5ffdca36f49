"""Turns what checkpoints pack into 32-bit words, and scales of tensors, rows and blocks, into our own coded weights.

A word holds its first number in its lowest bits, so its bytes in memory are the numbers in order (two of four bits to
a byte, the first in the low half): which is how our own codes lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inferfleet.kernels.quantized import Quantized, packed, unpacked


def bytes_of(words: Tensor) -> Tensor:
    """[..., W] int32 -> [..., 4 W] uint8."""
    return words.contiguous().view(torch.uint8)


def numbers_of(words: Tensor, bits: int, count: int) -> Tensor:
    """[R, W] int32 -> the first `count` numbers of each row, [R, count] uint8."""
    raw = bytes_of(words)
    return unpacked(raw, count) if bits == 4 else raw[:, :count]


def codes_of(words: Tensor, bits: int, inputs: int) -> Tensor:
    """[N, W] int32, packed along the inputs, numbers without a sign -> the codes of Quantized, [N, ...]."""
    raw = bytes_of(words)
    # Eight bits lose their offset of 128, four keep theirs of 8.
    return raw[:, : (inputs + 1) // 2] if bits == 4 else (raw[:, :inputs] ^ 128).view(torch.int8)


def zeros_of(numbers: Tensor, bits: int) -> Tensor:
    """[N, G] zeros of numbers without a sign -> those of Quantized."""
    return (numbers.to(torch.int16) - (128 if bits == 8 else 0)).contiguous()


def sorted_by_group(weight: Quantized, groups: Tensor) -> Quantized | Tensor:
    """A weight whose input k belongs to group groups[k]: its inputs put in order of their groups.

    Groups of unlike sizes do not lie side by side: such a weight is decoded instead.
    """
    inputs, group = weight.inputs, weight.group
    even = torch.arange(inputs) // group
    groups = groups.to(torch.int64)
    if torch.equal(groups, even):
        return weight
    codes = unpacked(weight.codes, inputs) if weight.kind == "int4" else weight.codes
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], even):
        return _decoded(weight, codes, groups)
    codes = codes[:, order]
    codes = packed(codes) if weight.kind == "int4" else codes
    return Quantized(weight.kind, inputs, group, codes, weight.scales, weight.zeros, order)


def _decoded(weight: Quantized, codes: Tensor, groups: Tensor) -> Tensor:
    middle = 8.0 if weight.kind == "int4" else 0.0
    zeros = middle if weight.zeros is None else weight.zeros[:, groups].float()
    return (codes.float() - zeros) * weight.scales[:, groups]


def scales_of(scale: Tensor, shape: tuple[int, int], block: tuple[int, int] | None) -> tuple[Tensor, int]:
    """One scale a tensor, a row, a group or a block of [N, K] -> (scales [N, G] float32, inputs of a group).

    block: rows and inputs of a block; None where the scale's own shape says it all. ValueError for another shape.
    """
    outputs, inputs = shape
    rows, group = block or (1, inputs)
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).repeat(outputs, 1), inputs
    if scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if tuple(scale.shape) != (-(-outputs // rows), -(-inputs // group)):
        raise ValueError(f"scales of {list(scale.shape)} over {outputs} x {inputs} in blocks of {rows} x {group}")
    return scale.repeat_interleave(rows, dim=0)[:outputs].contiguous(), group
