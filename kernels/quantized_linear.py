"""y = x @ weight.T + bias over a weight of small codes (kernels/quantized.py has the formats).

Weight-only: x stays as it is, codes are exact in every dtype that computes, and a scale is applied to the float32 sum
of what it covers. So the result differs from a product with the decoded weight by the rounding of sums alone.

On CPU csrc/quantized_linear.cpp decodes a tile of the weight in the cache, once for all rows, and a row's result does
not depend on the rows that come with it. Elsewhere a slice of the weight is decoded at a time for torch's product.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import build, threads
from inferfleet.kernels.quantized import KINDS, Quantized, row_chunks

#: As in csrc/product.h.
PANEL = 64


def reference(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """The formula in plain torch and float32: x [..., K] -> [..., N] of x's dtype; a slice of outputs at a time."""
    rows, outputs = x.reshape(-1, x.shape[-1]).float(), weight.shape[0]
    out = torch.empty(len(rows), outputs, dtype=x.dtype, device=x.device)
    for index in row_chunks(*weight.shape):
        part = None if bias is None else bias[index].float()
        out[:, index] = F.linear(rows, weight.rows(index).dequantised(), part)
    return out.view(*x.shape[:-1], outputs)


class QuantizedLinear:
    """A linear layer over a coded weight: call it with x [..., K] to get [..., N] of x's dtype.

    The weight is taken over; drop yours after this, or memory holds both. dtype is x's; `layout` says what the weight
    became: "panels" (csrc/quantized_linear.cpp) or "rows" (as it came).
    """

    def __init__(self, weight: Quantized, bias: Tensor | None = None, *, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = dtype, weight.codes.device
        self.bias = None if bias is None else bias.detach().contiguous()
        self.layout = best_layout(self.device, dtype)
        self.weight = PanelCodes([weight]) if self.layout == "panels" else weight
        if self.layout == "rows" and self.device.type == "cpu":
            threads.lend_to_torch()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype or x.shape[-1] != self.in_features:
            wanted = f"[..., {self.in_features}] of {self.dtype}"
            raise ValueError(f"this linear takes {wanted}, not {list(x.shape)} of {x.dtype}")
        if isinstance(self.weight, Quantized):
            return reference(x, self.weight, self.bias)
        return self._panels(x, self.weight)

    def _panels(self, x: Tensor, weight: PanelCodes) -> Tensor:
        if x.dim() != 2:
            return self._panels(x.reshape(-1, self.in_features), weight).view(*x.shape[:-1], self.out_features)
        if weight.order is not None:
            x = x[:, weight.order]
        rows = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        native = panels()
        assert native is not None, "the weight lies in panels, so there was a library"
        native[f"linear_{weight.kind}", self.dtype](
            out.data_ptr(),
            rows.data_ptr(),
            *weight.pointers(),
            None if self.bias is None else self.bias.data_ptr(),
            rows.shape[0],
            self.out_features,
            self.in_features,
            weight.group,
            rows.stride(0),
            threads.for_work(),
        )
        return out


class PanelCodes:
    """Coded weights of one format one after another, as csrc/quantized.h reads them: 64 outputs side by side, input by
    input and group by group. The list is emptied on the way: each weight is let go once it is laid out."""

    def __init__(self, weights: list[Quantized]) -> None:
        first = weights[0]
        self.kind, self.group, self.order = first.kind, first.group, first.order
        inputs, count = first.codes.shape[1], len(weights)
        # A byte-sized code has a partner, so that inputs can be read in pairs.
        width = inputs if first.kind == "int4" else inputs + inputs % 2
        self.codes = _panels_of(first.codes.view(torch.uint8), width, count)
        self.scales = _panels_of(first.scales, first.scales.shape[1], count)
        self.zeros = None if first.zeros is None else _panels_of(first.zeros, first.zeros.shape[1], count)
        for index in range(count):
            weight = weights[index]
            _lay_side_by_side(self.codes[index], weight.codes.view(torch.uint8))
            _lay_side_by_side(self.scales[index], weight.scales)
            if self.zeros is not None and weight.zeros is not None:
                _lay_side_by_side(self.zeros[index], weight.zeros)
            weights[index] = first
        weights.clear()

    def pointers(self) -> tuple[int, int, int | None]:
        return self.codes.data_ptr(), self.scales.data_ptr(), None if self.zeros is None else self.zeros.data_ptr()


def _panels_of(rows: Tensor, width: int, count: int) -> Tensor:
    return torch.zeros(count, -(-len(rows) // PANEL), width, PANEL, dtype=rows.dtype)


def _lay_side_by_side(panels: Tensor, rows: Tensor) -> None:
    """rows [N, W] -> [N/64 panels, at least W, 64]."""
    for panel, begin in enumerate(range(0, len(rows), PANEL)):
        some = rows[begin : begin + PANEL]
        panels[panel, : rows.shape[1], : len(some)] = some.T


def best_layout(device: torch.device, dtype: torch.dtype) -> str:
    """What a coded weight should become: "panels" where the C++ path runs, else "rows"."""
    return "panels" if device.type == "cpu" and dtype in build.SUFFIXES and panels() is not None else "rows"


@functools.cache
def panels() -> build.Functions | None:
    """The C++ path's functions, linear_<kind>, or None where there is no compiler."""
    arguments: list[Any] = [*[c_void_p] * 6, *[c_int64] * 6]
    return build.bind({f"linear_{kind}": arguments for kind in KINDS})
