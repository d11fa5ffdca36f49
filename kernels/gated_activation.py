"""The gate of a gated MLP: activation(gate) * up, from one matrix product that made both.

    gate, up = halves of the last dimension (gate first);   out = act(gate) * up, in float32

silu is g * sigmoid(g); gelu_tanh is 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import build, on_cuda, threads

Kind = Literal["silu", "gelu_tanh"]


def reference(gate_up: Tensor, kind: Kind) -> Tensor:
    """The formula in plain torch: gate_up [..., 2I] -> [..., I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return (gate * up).to(gate_up.dtype)


def gated_activation(gate_up: Tensor, kind: Kind) -> Tensor:
    """gate_up [..., 2I], gate first, -> act(gate) * up [..., I]; ValueError for an unknown kind."""
    if kind not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation must be silu or gelu_tanh, not {kind!r}")
    if (kernel := on_cuda.kernels("gated_activation_triton", gate_up)) is not None:
        gated: Tensor = kernel.gated_activation(gate_up, kind)
        return gated
    native = _native() if _takes(gate_up) else None
    if native is None:
        return reference(gate_up, kind)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    count = threads.for_elements(2 * out.numel())
    native[kind, gate_up.dtype](out.data_ptr(), gate_up.data_ptr(), rows, width, gate_up.stride(0), count)
    return out


@functools.cache
def _native() -> build.Functions | None:
    arguments = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]
    return build.bind({"silu": arguments, "gelu_tanh": arguments})


def _takes(gate_up: Tensor) -> bool:
    if not gate_up.is_cpu or gate_up.dtype not in build.SUFFIXES:
        return False
    return gate_up.dim() == 2 and gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0
