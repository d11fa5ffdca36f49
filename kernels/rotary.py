"""Rotary position embedding in the rotate_half layout, whole or partial, alone or after a head norm.

    (x1, x2) = halves of the first R numbers of a head      R = width of cos and sin
    x[:R]   <- (x1*cos - x2*sin, x2*cos + x1*sin)           x[R:] stays

cos and sin carry both halves ([T, R], the second equal to the first), as Hugging Face builds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inferfleet.kernels import rms_norm
from inferfleet.kernels.rms_norm import Style


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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by cos and sin [T, R], R even and <= D; computed in float32, returned like x."""
    return reference(x, cos, sin)


def norm_rotary(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *, style: Style = "llama"
) -> Tensor:
    """x [T, heads, D] normalised over D (weight [D] or None) and then turned: one pass over q or over k."""
    return norm_reference(x, weight, eps, cos, sin, style=style)
