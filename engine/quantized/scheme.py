"""Which format the weights of a quantised checkpoint have, from quantization_config in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel


class Scheme(Protocol):
    """How the tensors of one module become its weight."""

    @property
    def name(self) -> str:
        """For cards and messages, such as "gptq-int4"."""

    @property
    def members(self) -> frozenset[str]:
        """Last parts of the names of the tensors that make a weight; each module has some of them."""

    @property
    def unused(self) -> frozenset[str]:
        """Last parts of the names of tensors that say how to round activations, which stay as they are here."""

    def weight(self, module: str, parts: Mapping[str, Tensor]) -> Weight:
        """The weight [outputs, inputs]. KeyError for a part that is not there, ValueError for one that does not fit."""


def read_scheme(raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json, or None for plain weights; UnsupportedModel names the field that is foreign."""
    fields = _section(Fields(raw))
    if fields is None:
        return None
    from inferfleet.engine.quantized.awq import Awq
    from inferfleet.engine.quantized.compressed import CompressedTensors
    from inferfleet.engine.quantized.fp8 import Fp8
    from inferfleet.engine.quantized.gptq import Gptq

    methods: dict[str, Any] = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors, "fp8": Fp8}
    method = fields.text("quant_method")
    if method not in methods:
        known = ", ".join(sorted(methods))
        raise UnsupportedModel(f"{fields.where}: quant_method {method!r} is not one of {known}")
    scheme: Scheme = methods[method].read(fields)
    return scheme


def _section(whole: Fields) -> Fields | None:
    """quantization_config of the model or of its language part, under today's or yesterday's name."""
    text = whole.section("text_config", {})
    for fields in (whole, text):
        for name in ("quantization_config", "compression_config"):
            if name in fields:
                return fields.section(name)
    return None


def bits_of(fields: Fields, name: str, *supported: int) -> int:
    """The field, which must be one of the supported numbers of bits."""
    bits = fields.integer(name)
    if bits not in supported:
        shown = " and ".join(map(str, supported))
        raise UnsupportedModel(f"{fields.where}: {name} is {bits}; weights of {shown} bits are read")
    return bits


def group_of(fields: Fields) -> int | None:
    """group_size: inputs that share a scale, None (-1 in the file) for all of a row."""
    size = fields.integer("group_size", -1, least=-1)
    if size == 0 or (size > 0 and size % 2):
        raise UnsupportedModel(f"{fields.where}: group_size is {size}; it must be even, or -1 for whole rows")
    return None if size < 0 else size
