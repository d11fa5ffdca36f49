"""kernels/rms_norm.py and kernels/layer_norm.py on CUDA, in Triton: a row has one program, which reads it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, style: int
) -> tuple[Tensor, Tensor | None]:
    """(norm(x + residual), x + residual), or (norm(x), None); x [..., H], style as in kernels/rms_norm.py's STYLES."""
    return _norm(x, residual, weight, None, eps, STYLE=style, CENTRED=False)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """(norm(x + residual), x + residual), or (norm(x), None); x [..., H]."""
    return _norm(x, residual, weight, bias, eps, STYLE=1, CENTRED=True)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, **form: int | bool
) -> tuple[Tensor, Tensor | None]:
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    if residual is not None:
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    wide = triton.next_power_of_2(width)
    if rows.shape[0]:
        _rows[(rows.shape[0],)](
            *(out, total, rows, residual, weight, bias, rows.stride(0), 0 if residual is None else residual.stride(0)),
            eps, WIDTH=width, WIDE=wide, **form, num_warps=min(16, max(1, wide // 512)),
        )  # fmt: skip
    return out, total


@triton.jit
def _rows(
    out: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    STYLE: tl.constexpr,
    CENTRED: tl.constexpr,
) -> None:
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    inside = number < WIDTH
    dtype = out.dtype.element_ty
    values = tl.load(x + row * x_stride + number, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + number, mask=inside, other=0.0).to(tl.float32)
        # The sum is rounded before it is normalised.
        rounded = values.to(dtype)
        tl.store(total + row * WIDTH + number, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, axis=0) / WIDTH, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    values = scaled(values, weight, number, inside, dtype, STYLE)
    if bias is not None:
        values += tl.load(bias + number, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + number, values.to(dtype), mask=inside)


@triton.jit
def scaled(
    values: tl.tensor,
    weight: tl.tensor,
    number: tl.tensor,
    inside: tl.tensor,
    dtype: tl.constexpr,
    STYLE: tl.constexpr,
) -> tl.tensor:
    """Normalised float32 values times the weight in the given style, before the last rounding."""
    if weight is not None:
        factor = tl.load(weight + number, mask=inside, other=0.0).to(tl.float32)
        if STYLE == 0:
            values = values.to(dtype).to(tl.float32) * factor
        elif STYLE == 1:
            values = values * factor
        else:
            values = values * (1.0 + factor)
    return values
