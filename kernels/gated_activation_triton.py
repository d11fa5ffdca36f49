"""kernels/gated_activation.py on CUDA, in Triton: one pass over both halves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """gate_up [..., 2I], gate first, -> [..., I]; kind is silu or gelu_tanh."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(width, COLUMNS))
        _gate[grid](out, rows, rows.stride(0), width, IS_SILU=kind == "silu", COLUMNS=COLUMNS)
    return out


@triton.jit
def _gate(
    out: tl.tensor,
    gate_up: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    IS_SILU: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = number < width
    gate = tl.load(gate_up + row * stride + number, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + number, mask=inside, other=0.0).to(tl.float32)
    if IS_SILU:
        gate = gate * tl.sigmoid(gate)
    else:
        # 0.5 (1 + tanh z) is the sigmoid of 2z.
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * width + number, (gate * up).to(out.dtype.element_ty), mask=inside)
