"""Layer normalisation with weight and bias over the last dimension, alone or after the residual addition.

    y = (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias

var is the mean squared distance from the mean. All of it is computed in float32, weight and bias included, and cast
down once at the end.
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, on_cuda, threads


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula in plain torch: x [..., H], weight and bias [H], result like x."""
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight.float() + bias.float()).to(x.dtype)


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum is rounded to the dtype before it is normalised."""
    total = x + residual
    return reference(total, weight, bias, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., H] normalised over H, times weight [H], plus bias [H]; the result is like x."""
    if (kernel := on_cuda.kernels("norms_triton", x, weight, bias)) is not None:
        normed: Tensor = kernel.layer_norm(x, None, weight, bias, eps)[0]
        return normed
    native = _native() if _takes(x, weight, bias) else None
    if native is None:
        return reference(x, weight, bias, eps)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = build.empty_like(x)
    _call(native, out, None, rows, None, weight, bias, eps)
    return out


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [T, H] -> (normalised sum, sum): the pair every pre-norm block needs, read once."""
    if (kernel := on_cuda.kernels("norms_triton", x, residual, weight, bias)) is not None:
        pair: tuple[Tensor, Tensor] = kernel.layer_norm(x, residual, weight, bias, eps)
        return pair
    native = _native() if _takes(x, weight, bias) and x.dim() == 2 and _fits(residual, x) else None
    if native is None:
        return add_reference(x, residual, weight, bias, eps)
    out, total = build.empty_like(x), build.empty_like(x)
    _call(native, out, total, x, residual, weight, bias, eps)
    return out, total


@functools.cache
def _native() -> build.Functions | None:
    pointers, sizes = [c_void_p] * 6, [c_int64] * 4
    return build.bind({"layer_norm": [*pointers, *sizes, c_float, c_int64]})


def _takes(x: Tensor, *vectors: Tensor) -> bool:
    if not x.is_cpu or x.dtype not in build.SUFFIXES or x.stride(-1) != 1:
        return False
    return all(v.dtype is x.dtype and v.is_contiguous() and v.shape == x.shape[-1:] for v in vectors)


def _fits(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype is x.dtype and residual.is_cpu and residual.shape == x.shape and residual.stride(1) == 1


def _call(
    native: build.Functions,
    out: Tensor,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    rows, width = x.shape
    native["layer_norm", x.dtype](
        out.data_ptr(),
        None if total is None else total.data_ptr(),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        rows,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        threads.for_elements(rows * width),
    )
