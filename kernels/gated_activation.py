"""The gate of a gated MLP: activation(gate) * up, from one matrix product that made both.

    gate, up = halves of the last dimension (gate first);   out = act(gate) * up, in float32

silu is g * sigmoid(g); gelu_tanh is 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

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
    return reference(gate_up, kind)
