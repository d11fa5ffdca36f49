"""kernels/rotary.py on CUDA, in Triton: a head of a token has one program; a norm before it needs no kernel of its own.

Each number reads its partner, the one that it turns together with, from memory again: the line is in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferfleet.kernels.norms_triton import scaled


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    in_pairs: bool = False,
    norm: tuple[Tensor | None, float, int] | None = None,
) -> Tensor:
    """x [T, heads, D] turned by cos and sin [T, R]; norm: (weight, eps, style) of a norm over each head before that."""
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, heads, width = x.shape
    weight, eps, style = norm or (None, 0.0, 0)
    wide = triton.next_power_of_2(width)
    if out.numel():
        _heads[(tokens, heads)](
            *(out, x, weight, cos, sin, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), eps),
            WIDTH=width, WIDE=wide, TURNED=cos.shape[1], IN_PAIRS=in_pairs, NORMED=norm is not None, STYLE=style,
            num_warps=max(1, wide // 256),
        )  # fmt: skip
    return out


@triton.jit
def _heads(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    x_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TURNED: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
    STYLE: tl.constexpr,
) -> None:
    token, head, number = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDE)
    HALF: tl.constexpr = TURNED // 2
    inside, turns = number < WIDTH, number < TURNED
    if IN_PAIRS:
        partner, angle, is_first = number ^ 1, number // 2, number % 2 == 0
    else:
        is_first = number < HALF
        partner, angle = tl.where(is_first, number + HALF, number - HALF), number
    place = x + token * x_stride + head * head_stride
    own = tl.load(place + number, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(place + partner, mask=turns, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    if NORMED:
        scale = tl.rsqrt(tl.sum(own * own, axis=0) / WIDTH + eps)
        # The norm's result is rounded before it is turned.
        own = scaled(own * scale, weight, number, inside, dtype, STYLE).to(dtype).to(tl.float32)
        other = scaled(other * scale, weight, partner, turns, dtype, STYLE).to(dtype).to(tl.float32)
    c = tl.load(cos + token * cos_stride + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + angle, mask=turns, other=0.0).to(tl.float32)
    turned = own * c + tl.where(is_first, -other, other) * s
    at = (token * tl.num_programs(1) + head) * WIDTH + number
    tl.store(out + at, tl.where(turns, turned, own).to(dtype), mask=inside)
