"""Root-mean-square normalisation over the last dimension, alone or joined with the residual addition before it.

    y = x * rsqrt(mean(x^2) + eps)          computed in float32

and the weight enters in one of three ways, which differ only in rounding and in the meaning of the stored weight:

    llama          weight * y.to(dtype)              multiplied after the cast down (Qwen3, Llama)
    gemma          (y * weight.float()).to(dtype)    multiplied before the cast down (Gemma 3n, Gemma 4)
    zero_centered  (y * (1 + weight.float())).to(dtype)                            (Qwen3-Next)

Without a weight all three are y.to(dtype).
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from inferfleet.kernels import build, on_cuda, threads

Style = Literal["llama", "gemma", "zero_centered"]

STYLES: dict[Style, int] = {"llama": 0, "gemma": 1, "zero_centered": 2}  # as in csrc/norm.h


def reference(x: Tensor, weight: Tensor | None, eps: float, *, style: Style = "llama") -> Tensor:
    """The formula in plain torch: x [..., H], weight [H] or None, result like x."""
    x32 = x.float()
    y = x32 * torch.pow(x32.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is None:
        return y.to(x.dtype)
    if style == "llama":
        return weight * y.to(x.dtype)
    if style == "gemma":
        return (y * weight.float()).to(x.dtype)
    return (y * (1.0 + weight.float())).to(x.dtype)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, style: Style = "llama"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype before it is normalised."""
    total = x + residual
    return reference(total, weight, eps, style=style), total


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, style: Style = "llama") -> Tensor:
    """x [..., H] normalised over H, times weight [H] in the given style; the result is like x."""
    if (kernel := on_cuda.kernels("norms_triton", x, weight)) is not None:
        normed: Tensor = kernel.rms_norm(x, None, weight, eps, STYLES[style])[0]
        return normed
    native = _native() if _takes(x, weight) else None
    if native is None:
        return reference(x, weight, eps, style=style)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1])
    out = build.empty_like(x)
    _call(native, out, None, rows, None, weight, eps, style)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, style: Style = "llama"
) -> tuple[Tensor, Tensor]:
    """x and residual [T, H] -> (normalised sum, sum): the pair every pre-norm block needs, read once."""
    if (kernel := on_cuda.kernels("norms_triton", x, residual, weight)) is not None:
        pair: tuple[Tensor, Tensor] = kernel.rms_norm(x, residual, weight, eps, STYLES[style])
        return pair
    native = _native() if _takes(x, weight) and x.dim() == 2 and _fits(residual, x) else None
    if native is None:
        return add_reference(x, residual, weight, eps, style=style)
    out, total = build.empty_like(x), build.empty_like(x)
    _call(native, out, total, x, residual, weight, eps, style)
    return out, total


@functools.cache
def _native() -> build.Functions | None:
    pointers, sizes = [c_void_p] * 5, [c_int64] * 4
    return build.bind({"rms_norm": [*pointers, *sizes, c_float, c_int64, c_int64]})


def _takes(x: Tensor, weight: Tensor | None) -> bool:
    if not x.is_cpu or x.dtype not in build.SUFFIXES or x.stride(-1) != 1:
        return False
    return weight is None or (weight.dtype is x.dtype and weight.is_contiguous() and weight.shape[0] == x.shape[-1])


def _fits(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype is x.dtype and residual.is_cpu and residual.shape == x.shape and residual.stride(1) == 1


def _call(
    native: build.Functions,
    out: Tensor,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    style: Style,
) -> None:
    rows, width = x.shape
    native["rms_norm", x.dtype](
        out.data_ptr(),
        None if total is None else total.data_ptr(),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        rows,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        STYLES[style],
        threads.for_elements(rows * width),
    )
