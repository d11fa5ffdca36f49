"""y = x @ weight.T + bias, with the weight laid out once for the machine's matrix product.

On CPU the weight is packed at load, for csrc/linear.cpp where the CPU has the vectors for it, else for oneDNN, whose
blocked layout also beats `F.linear` 1.2 to 4 times at the row counts of decoding. The plain weight is not kept.

A row's result does not depend on how many rows come with it. The C++ path sums every output input by input. oneDNN's
sums do not change with the row count from two rows up (measured from 2 to 1024 over this project's shapes), but one
row alone may be summed in another order; so there one row is computed as two, which costs nothing while the weight's
bytes are what takes the time.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import build, threads

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain torch: x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    return F.linear(x, weight, bias)


class PackedLinear:
    """A linear layer without a plain weight: call it with x [..., K] to get [..., N], dtype and device as the weight's.

    weight [N, K] and bias [N] are taken over; drop yours after this, or memory holds both. `layout` says what the
    weight became: "panels" (csrc/linear.cpp), "onednn", or "plain" where neither has a path (CUDA, other dtypes).
    With to_float the result is float32, which the panels give unrounded: logits of bfloat16 would tie by the dozen.
    With can_cut the layout is one that allows `corner`, even where another is faster.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, to_float: bool = False, can_cut: bool = False
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.out_dtype = torch.float32 if to_float else weight.dtype
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = None if bias is None else bias.detach().contiguous()
        self.layout = cuttable_layout(weight) if can_cut else best_layout(weight)
        self.weight = _PACKERS[self.layout](weight.detach())
        if self.layout != "panels" and weight.device.type == "cpu":
            threads.lend_to_torch()

    def __call__(self, x: Tensor) -> Tensor:
        if self.layout == "plain":
            return F.linear(x, self.weight, self.bias).to(self.out_dtype)
        if x.dtype is not self.dtype or x.shape[-1] != self.in_features:
            wanted = f"[..., {self.in_features}] of {self.dtype}"
            raise ValueError(f"this linear takes {wanted}, not {list(x.shape)} of {x.dtype}")
        return self._panels(x, self.out_features) if self.layout == "panels" else self._onednn(x).to(self.out_dtype)

    def corner(self, x: Tensor, outputs: int) -> Tensor:
        """x [T, k] -> [T, outputs]: the product with weight[:outputs, :k], which is read where it lies, not copied.

        ValueError for more than the weight has, or for less than all of it in oneDNN's layout, which cannot be cut.
        """
        inputs = x.shape[-1]
        if (outputs, inputs) == (self.out_features, self.in_features):
            return self(x)
        fits = x.dim() == 2 and x.dtype is self.dtype and inputs <= self.in_features and outputs <= self.out_features
        if not fits or self.layout == "onednn":
            whole = f"{self.out_features} x {self.in_features} of {self.dtype} in the layout {self.layout}"
            raise ValueError(f"no corner of {outputs} x {inputs} of {x.dtype} in a weight of {whole}")
        if self.layout == "panels":
            return self._panels(x, outputs)
        bias = None if self.bias is None else self.bias[:outputs]
        return F.linear(x, self.weight[:outputs, :inputs], bias).to(self.out_dtype)

    def _panels(self, x: Tensor, outputs: int) -> Tensor:
        if x.dim() != 2:
            return self._panels(x.reshape(-1, x.shape[-1]), outputs).view(*x.shape[:-1], outputs)
        rows = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], outputs, dtype=self.out_dtype)
        native = panels()
        assert native is not None, "the weight lies in panels, so there was a library"
        native["linear_to_float" if self.out_dtype is torch.float32 else "linear", self.dtype](
            out.data_ptr(),
            rows.data_ptr(),
            self.weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            rows.shape[0],
            outputs,
            rows.shape[1],
            self.in_features,
            rows.stride(0),
            threads.for_work(),
        )
        return out

    def _onednn(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features:
            pair = x.reshape(1, -1).expand(2, -1).contiguous()
            return self._multiply(pair)[:1].view(*x.shape[:-1], self.out_features)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@functools.cache
def panels() -> build.Functions | None:
    """The C++ path's functions, or None where there is no compiler."""
    linear: list[Any] = [*[c_void_p] * 4, *[c_int64] * 6]
    pack: list[Any] = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
    layout: dict[str, list[Any]] = {"pack": pack, "packed_size": [c_int64, c_int64], "suits_machine": []}
    return build.bind({"linear": linear, "linear_to_float": linear, **layout})


def panels_suit(dtype: torch.dtype) -> bool:
    """Whether csrc/linear.cpp is the fastest product that this CPU has for the dtype."""
    native = panels() if dtype in build.SUFFIXES else None
    return native is not None and bool(native["suits_machine", dtype]())


def pack_panels(weight: Tensor) -> Tensor:
    """weight [N, K] on the CPU -> its panels, flat, as csrc/product.h describes them."""
    native = panels()
    assert native is not None, "ask panels_suit first"
    outputs, inputs = weight.shape
    weight = weight.contiguous()
    packed = torch.empty(native["packed_size", weight.dtype](outputs, inputs), dtype=weight.dtype)
    native["pack", weight.dtype](packed.data_ptr(), weight.data_ptr(), outputs, inputs, threads.for_work())
    return packed


def best_layout(weight: Tensor) -> str:
    """What the weight should become on its device: "panels", "onednn" or "plain"."""
    if weight.device.type != "cpu":
        return "plain"
    if panels_suit(weight.dtype):
        return "panels"
    has_onednn = torch.backends.mkldnn.is_available() and weight.dtype in _ONEDNN_DTYPES
    if weight.dtype == torch.bfloat16:
        has_onednn = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "onednn" if has_onednn else "plain"


def cuttable_layout(weight: Tensor) -> str:
    """As best_layout, for a weight of which corners will be wanted: "panels" wherever they can be had, else "plain"."""
    has_panels = weight.device.type == "cpu" and weight.dtype in build.SUFFIXES and panels() is not None
    return "panels" if has_panels else "plain"


def _pack_onednn(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


_PACKERS = {"panels": pack_panels, "onednn": _pack_onednn, "plain": lambda weight: weight}
