"""compressed-tensors: packed integers, or integers and float8 a byte each, with rules for which module has which.

weight_packed [N, K/p] int32 of numbers without a sign (offset 2^(bits-1)), or weight [N, K] int8 or float8
weight_scale [1], [N, 1], [N, G] or [N/b, K/b]; weight_zero_point in the same places (packed along N);
weight_g_idx [K]: the group of each input; weight_shape: [N, K]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.quantized.bits import codes_of, numbers_of, scales_of, sorted_by_group, zeros_of
from inferfleet.engine.quantized.fp8 import float8
from inferfleet.engine.quantized.scheme import bits_of
from inferfleet.kernels.quantized import Quantized

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Group:
    """The modules of one rule and the format of their weights."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    #: Rows and inputs that share a scale; None for whole tensors and whole rows, which the scale's shape tells apart.
    block: tuple[int, int] | None

    @classmethod
    def read(cls, fields: Fields) -> Group:
        weights = fields.section("weights")
        kind, strategy = weights.text("type", "int"), weights.text("strategy", "")
        if kind not in ("int", "float") or weights.boolean("dynamic", False):
            raise UnsupportedModel(f"{weights.where}: type is {kind!r}; static int and float are read")
        block: tuple[int, int] | None = None
        if strategy == "group" or (not strategy and weights.integer("group_size", -1, least=-1) > 0):
            block = (1, weights.integer("group_size"))
        elif strategy == "block":
            size = weights.list_of(int, "block_structure")
            block = (size[0], size[-1])
        elif strategy not in ("tensor", "channel", ""):
            raise UnsupportedModel(f"{weights.where}: strategy is {strategy!r}, not tensor, channel, group or block")
        if block is not None and (block[1] % 2 or min(block) < 1):
            raise UnsupportedModel(f"{weights.where}: groups of {block[1]} inputs are not read, even ones are")
        bits = bits_of(weights, "num_bits", *((8,) if kind == "float" else (4, 8)))
        return cls(tuple(fields.list_of(str, "targets")), bits, kind == "float", block)

    def rank(self, module: str) -> int | None:
        """How closely a target names the module (lowest first), or None if none does."""
        ranks = [rank for target in self.targets if (rank := _rank(target, module)) is not None]
        return min(ranks, default=None)


def _rank(target: str, module: str) -> int | None:
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    if target == module:
        return 0
    return 2 if target == "Linear" else None


@dataclass(frozen=True)
class CompressedTensors:
    """Weights of four or eight bits; activations stay as they are, whatever the checkpoint would round them to."""

    groups: tuple[Group, ...]
    members = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    )
    unused = frozenset(
        {
            *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
            *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
        }
    )

    @classmethod
    def read(cls, fields: Fields) -> CompressedTensors:
        sections = fields.section("config_groups")
        for where in (fields, *(sections.section(name) for name in sections.values)):
            where.refuse("format", *FORMATS, *(("mixed-precision",) if where is fields else ()))
        sparsity = fields.section("sparsity_config", {})
        sparsity.refuse("format", "dense")
        if fields.section("transform_config", {}).values:
            raise UnsupportedModel(f"{fields.where}: transform_config turns activations, which is not done here")
        groups = tuple(Group.read(sections.section(name)) for name in sections.values)
        if not groups:
            raise UnsupportedModel(f"{fields.where}: config_groups is empty")
        return cls(groups)

    @property
    def name(self) -> str:
        kinds = sorted({f"{'fp' if group.is_float else 'int'}{group.bits}" for group in self.groups})
        return f"compressed-tensors-{'-'.join(kinds)}"

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Weight:
        if "weight_packed" not in parts and parts["weight"].dtype.itemsize > 1 and "weight_scale" not in parts:
            return parts["weight"]
        group = self._group(module)
        if group.is_float:
            return float8(parts["weight"], parts["weight_scale"], group.block)
        return _packed(group, parts) if "weight_packed" in parts else _bytes(group, parts)

    def _group(self, module: str) -> Group:
        ranks = [(group.rank(module), number) for number, group in enumerate(self.groups)]
        ranked = [(rank, number) for rank, number in ranks if rank is not None]
        if not ranked:
            raise ValueError("its weight is quantised, but no target of config_groups names it")
        return self.groups[min(ranked)[1]]


def _packed(group: Group, parts: Mapping[str, Tensor]) -> Weight:
    outputs, inputs = (int(size) for size in parts["weight_shape"])
    words = parts["weight_packed"]
    if words.shape != (outputs, -(-inputs * group.bits // 32)):
        raise ValueError(f"weight_packed of {list(words.shape)} is not {outputs} x {inputs} of {group.bits} bits")
    return _integers(group, codes_of(words, group.bits, inputs), inputs, parts)


def _bytes(group: Group, parts: Mapping[str, Tensor]) -> Weight:
    stored = parts["weight"]
    if stored.dtype is not torch.int8:
        raise ValueError(f"a weight of {stored.dtype}, where int8 is read")
    return _integers(Group(group.targets, 8, False, group.block), stored.contiguous(), stored.shape[1], parts)


def _integers(group: Group, codes: Tensor, inputs: int, parts: Mapping[str, Tensor]) -> Weight:
    outputs = len(codes)
    scales, size = scales_of(parts["weight_scale"], (outputs, inputs), group.block)
    zeros: Tensor | None = None
    if (stored := parts.get("weight_zero_point")) is not None:
        if stored.dtype is torch.int32:  # packed along the outputs
            zeros = zeros_of(numbers_of(stored.T, group.bits, outputs).T, group.bits)
        else:
            own, _ = scales_of(stored, (outputs, inputs), group.block)
            zeros = own.to(torch.int16) + (8 if group.bits == 4 else 0)
    kind = "int4" if group.bits == 4 else "int8"
    coded = Quantized("int4" if kind == "int4" else "int8", inputs, size, codes, scales, zeros)
    order = parts.get("weight_g_idx")
    return coded if order is None or int(order.min()) < 0 else sorted_by_group(coded, order)
