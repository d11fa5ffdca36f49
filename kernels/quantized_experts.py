"""The mixture of kernels/moe.py over weights of small codes (kernels/quantized.py).

On CPU one call of csrc/quantized_experts.cpp does all experts, where their weights are of one format; elsewhere each
chosen expert runs two coded linears.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, threads
from inferfleet.kernels.gated_activation import Kind, gated_activation
from inferfleet.kernels.quantized import KINDS, Quantized
from inferfleet.kernels.quantized_linear import PanelCodes, best_layout

#: x [T, inputs] -> [T, outputs].
Product = Callable[[Tensor], Tensor]


def can_fuse(weights: Iterable[Quantized], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one call can run experts of these gate-up (or down) weights: the C++ path, and one format for all."""
    formats = {(w.kind, w.shape, w.group, w.zeros is None, w.order is None) for w in weights}
    return best_layout(device, dtype) == "panels" and len(formats) == 1 and next(iter(formats))[-1]


class FusedExperts:
    """All experts in one call; `can_fuse` must hold for both lists.

    gate_up: [2I, H] of each expert, gate first; down: [H, I] of each. Both lists are emptied as they are laid out.
    """

    def __init__(
        self, gate_up: list[Quantized], down: list[Quantized], activation: Kind, *, dtype: torch.dtype
    ) -> None:
        self.activation, self.dtype, self.num_experts = activation, dtype, len(down)
        self.hidden, self.inner = down[0].shape
        halves = [[w.rows(slice(self.inner)) for w in gate_up], [w.rows(slice(self.inner, None)) for w in gate_up]]
        gate_up.clear()
        self.weights = [PanelCodes(some) for some in (*halves, down)]

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids [T, K] int below E, topk_weights [T, K] -> [T, H]."""
        rows = x if x.stride(1) == 1 else x.contiguous()
        ids, shares = topk_ids.to(torch.int64).contiguous(), topk_weights.to(torch.float32).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        native = _native()
        assert native is not None, "can_fuse says so"
        gate, _, down = self.weights
        native[f"experts_{gate.kind}_{self.activation}", self.dtype](
            out.data_ptr(),
            rows.data_ptr(),
            *(pointer for weight in self.weights for pointer in weight.pointers()),
            ids.data_ptr(),
            shares.data_ptr(),
            *ids.shape,
            self.num_experts,
            self.hidden,
            self.inner,
            gate.group,
            down.group,
            rows.stride(0),
            threads.for_work(),
        )
        return out


class SingleExperts:
    """Each chosen expert as two linears of any kind, plain ones among them."""

    def __init__(self, pairs: Sequence[tuple[Product, Product]], activation: Kind) -> None:
        self.pairs, self.activation = pairs, activation

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids [T, K] int below E, topk_weights [T, K] -> [T, H]."""
        order = topk_ids.flatten().argsort(stable=True)
        counts = topk_ids.flatten().bincount(minlength=len(self.pairs)).tolist()
        gathered = x[order // topk_ids.shape[1]]
        parts = torch.empty(gathered.shape, dtype=torch.float32, device=x.device)
        begin = 0
        for (gate_up, down), count in zip(self.pairs, counts, strict=True):
            if count:
                rows = slice(begin, begin + count)
                parts[rows] = down(gated_activation(gate_up(gathered[rows]), self.activation)).float()
                begin += count
        # Back to [T, K, H], so that a token's choices are added in the order of k whatever else is in the batch.
        by_choice = torch.empty_like(parts).index_copy_(0, order, parts).view(*topk_ids.shape, x.shape[1])
        return (by_choice * topk_weights.float().unsqueeze(2)).sum(1).to(x.dtype)


@functools.cache
def _native() -> build.Functions | None:
    arguments = [*[c_void_p] * 13, *[c_int64] * 9]
    return build.bind({f"experts_{kind}_{act}": arguments for kind in KINDS for act in ("silu", "gelu_tanh")})
