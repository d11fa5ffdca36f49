"""Mixture of experts: each token goes through its K chosen gated MLPs, and the results are summed by weight.

    out[t] = sum_k  w[t,k] * down[e] @ (act(gate_up[e] @ x[t], gate half) * up half)        e = ids[t,k]

Tokens are sorted by expert, so that an expert's weights are read once for all its tokens and an expert that nobody
chose is not read at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inferfleet.kernels.gated_activation import Kind, gated_activation
from inferfleet.kernels.linear import PackedLinear


def reference(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor, activation: Kind
) -> Tensor:
    """The formula in plain torch, an expert at a time, summed in float32; same arguments as `fused_experts`."""
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = gated_activation(torch.nn.functional.linear(x[token], gate_up[expert]), activation)
        part = torch.nn.functional.linear(hidden, down[expert]).float()
        out.index_add_(0, token, part * topk_weights[token, choice].float().unsqueeze(1))
    return out.to(x.dtype)


def fused_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor, activation: Kind
) -> Tensor:
    """x [T, H], gate_up [E, 2I, H] (gate first), down [E, H, I], topk_ids and topk_weights [T, K] -> [T, H]."""
    return reference(x, gate_up, down, topk_ids, topk_weights, activation)


class PackedExperts:
    """The same product over weights that were laid out once: call it with (x, topk_ids, topk_weights).

    gate_up [E, 2I, H] and down [E, H, I] are taken over; drop yours after this, or memory holds both.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Kind) -> None:
        self.activation = activation
        self.gate_up = [PackedLinear(weight) for weight in gate_up]
        self.down = [PackedLinear(weight) for weight in down]

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids [T, K] int, topk_weights [T, K] -> [T, H]."""
        order, counts = _by_expert(topk_ids, len(self.gate_up))
        token = order // topk_ids.shape[1]
        gathered = x[token]
        parts = torch.empty_like(gathered)
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(begin, begin + count)
                hidden = gated_activation(self.gate_up[expert](gathered[rows]), self.activation)
                parts[rows] = self.down[expert](hidden)
                begin += count
        weighted = parts.float() * topk_weights.flatten()[order].float().unsqueeze(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return out.index_add_(0, token, weighted).to(x.dtype)


def _by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """(flat choice indices sorted by expert [T*K], how many choices each expert got)."""
    flat = topk_ids.flatten()
    return flat.argsort(stable=True), flat.bincount(minlength=num_experts).tolist()
