"""Rotary position embedding of heads, whole or partial, in either of two layouts; of halves also after a head norm.

    (x1, x2) = halves of the first R numbers of a head (apply_rotary), or its even and odd ones (apply_rotary_pairs)
    (x1, x2) <- (x1*cos - x2*sin, x2*cos + x1*sin)          R = width of cos and sin; x[R:] stays

cos and sin carry both halves ([T, R], the second equal to the first), as Hugging Face builds them for apply_rotary;
apply_rotary_pairs reads the first.
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, on_cuda, rms_norm, threads
from inferfleet.kernels.rms_norm import STYLES, Style

MAX_WIDTH = 1024  # of a head, as in csrc/rotary.cpp


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in plain torch: x [T, heads, D], cos and sin [T, R] with R <= D, result like x."""
    width = cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos32, sin32 = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    turned = turned * cos32 + torch.cat((-second, first), dim=-1) * sin32
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *, style: Style = "llama"
) -> Tensor:
    """apply_rotary(rms_norm(x)): the norm's result is rounded to the dtype before it is turned."""
    return reference(rms_norm.reference(x, weight, eps, style=style), cos, sin)


def pairs_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_pairs` in plain torch."""
    width = cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    cos32, sin32 = (t[:, : width // 2].float().unsqueeze(-2) for t in (cos, sin))
    turned = torch.stack((even * cos32 - odd * sin32, odd * cos32 + even * sin32), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by cos and sin [T, R], R even and <= D; computed in float32, returned like x."""
    if (kernel := on_cuda.kernels("rotary_triton", x)) is not None:
        turned: Tensor = kernel.turn(x, cos, sin)
        return turned
    native = _native() if _takes(x, None, cos, sin) else None
    if native is None:
        return reference(x, cos, sin)
    return _call(native, x, None, cos, sin, 0.0, "llama", normed=0)


def apply_rotary_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for a head whose neighbours (2i, 2i + 1) turn together; the result keeps that order."""
    if (kernel := on_cuda.kernels("rotary_triton", x)) is not None:
        turned: Tensor = kernel.turn(x, cos, sin, in_pairs=True)
        return turned
    native = _native() if _takes(x, None, cos, sin) else None
    if native is None:
        return pairs_reference(x, cos, sin)
    out = build.empty_like(x)
    native["rotary_pairs", x.dtype](
        out.data_ptr(),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *x.shape,
        cos.shape[1],
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        threads.for_elements(x.numel()),
    )
    return out


def norm_rotary(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *, style: Style = "llama"
) -> Tensor:
    """x [T, heads, D] normalised over D (weight [D] or None) and then turned: one pass over q or over k."""
    if (kernel := on_cuda.kernels("rotary_triton", x, weight)) is not None:
        turned: Tensor = kernel.turn(x, cos, sin, norm=(weight, eps, STYLES[style]))
        return turned
    native = _native() if _takes(x, weight, cos, sin) else None
    if native is None:
        return norm_reference(x, weight, eps, cos, sin, style=style)
    return _call(native, x, weight, cos, sin, eps, style, normed=1)


@functools.cache
def _native() -> build.Functions | None:
    pointers, sizes = [c_void_p] * 5, [c_int64] * 7
    halves = [*pointers, *sizes, c_float, c_int64, c_int64, c_int64]
    return build.bind({"rotary": halves, "rotary_pairs": [*pointers[1:], *sizes, c_int64]})


def _takes(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
    if not x.is_cpu or x.dtype not in build.SUFFIXES or x.dim() != 3 or x.stride(2) != 1:
        return False
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return False
    if not cos.is_contiguous() or not sin.is_contiguous() or cos.shape != sin.shape or cos.shape[0] != x.shape[0]:
        return False
    if weight is not None and (weight.dtype is not x.dtype or not weight.is_contiguous()):
        return False
    turned = cos.shape[1]
    return turned % 2 == 0 and turned <= x.shape[2] <= MAX_WIDTH


def _call(
    native: build.Functions,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    style: Style,
    *,
    normed: int,
) -> Tensor:
    out = build.empty_like(x)
    native["rotary", x.dtype](
        out.data_ptr(),
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *x.shape,
        cos.shape[1],
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        eps,
        STYLES[style],
        normed,
        threads.for_elements(x.numel()),
    )
    return out
