"""Root-mean-square normalisation over the last dimension, alone or joined with the residual addition before it.

    y = x * rsqrt(mean(x^2) + eps)          computed in float32

and the weight enters in one of three ways, which differ only in rounding and in the meaning of the stored weight:

    llama          weight * y.to(dtype)              multiplied after the cast down (Qwen3, Llama)
    gemma          (y * weight.float()).to(dtype)    multiplied before the cast down (Gemma 3n, Gemma 4)
    zero_centered  (y * (1 + weight.float())).to(dtype)                            (Qwen3-Next)

Without a weight all three are y.to(dtype).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Style = Literal["llama", "gemma", "zero_centered"]


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
    return reference(x, weight, eps, style=style)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, style: Style = "llama"
) -> tuple[Tensor, Tensor]:
    """x and residual [..., H] -> (normalised sum, sum): the pair every pre-norm block needs, read once."""
    return add_reference(x, residual, weight, eps, style=style)
