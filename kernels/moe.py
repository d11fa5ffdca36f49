"""Mixture of experts: each token goes through its K chosen gated MLPs, and the results are summed by weight.

    out[t] = sum_k  w[t,k] * down[e] @ (act(gate_up[e] @ x[t], gate half) * up half)        e = ids[t,k]

Tokens are sorted by expert, so that an expert's weights are read once for all its tokens and an expert that nobody
chose is not read at all.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import build, linear, threads
from inferfleet.kernels.gated_activation import Kind, gated_activation
from inferfleet.kernels.grouped_linear import GroupedLinear, sort_by_group


def reference(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor, activation: Kind
) -> Tensor:
    """The formula in plain torch, an expert at a time, summed in float32; same arguments as `fused_experts`."""
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        hidden = gated_activation(F.linear(x[token], gate_up[expert]), activation)
        part = F.linear(hidden, down[expert]).float()
        out.index_add_(0, token, part * topk_weights[token, choice].float().unsqueeze(1))
    return out.to(x.dtype)


def fused_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_ids: Tensor, topk_weights: Tensor, activation: Kind
) -> Tensor:
    """x [T, H], gate_up [E, 2I, H] (gate first), down [E, H, I], topk_ids and topk_weights [T, K] -> [T, H].

    For weights that stay as they are; a model packs them once with `PackedExperts`.
    """
    return reference(x, gate_up, down, topk_ids, topk_weights, activation)


class PackedExperts:
    """The same product over weights that were laid out once: call it with (x, topk_ids, topk_weights).

    gate_up [E, 2I, H] and down [E, H, I] are taken over; drop yours after this, or memory holds both. On a CPU that
    csrc/moe.cpp suits, one call does all experts; elsewhere two grouped products do.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Kind) -> None:
        self.activation = activation
        self.dtype, self.num_experts = gate_up.dtype, gate_up.shape[0]
        self.hidden, self.inner = down.shape[1], down.shape[2]
        self.is_fused = _native() is not None and linear.best_layout(gate_up) == "panels"
        if self.is_fused:
            self.gate = _stack(gate_up[:, : self.inner])
            self.up = _stack(gate_up[:, self.inner :])
            self.down = _stack(down)
        else:
            self.first, self.second = GroupedLinear(gate_up), GroupedLinear(down)

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H], topk_ids [T, K] int below E, topk_weights [T, K] -> [T, H]."""
        run = self._fused if self.is_fused else self._sorted
        return run(x, topk_ids, topk_weights)

    def _fused(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows = x if x.stride(1) == 1 else x.contiguous()
        ids, shares = topk_ids.to(torch.int64).contiguous(), topk_weights.to(torch.float32).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        native = _native()
        assert native is not None, "is_fused says so"
        native[f"experts_{self.activation}", self.dtype](
            out.data_ptr(),
            rows.data_ptr(),
            self.gate.data_ptr(),
            self.up.data_ptr(),
            self.down.data_ptr(),
            ids.data_ptr(),
            shares.data_ptr(),
            *ids.shape,
            self.num_experts,
            self.hidden,
            self.inner,
            rows.stride(0),
            threads.for_work(),
        )
        return out

    def _sorted(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        order, offsets = sort_by_group(topk_ids.flatten(), self.num_experts)
        inner = gated_activation(self.first(x[order // topk_ids.shape[1]], offsets), self.activation)
        parts = self.second(inner, offsets).float()
        # Back to [T, K, H], so that a token's choices are added in the order of k whatever else is in the batch.
        by_choice = torch.empty_like(parts).index_copy_(0, order, parts).view(*topk_ids.shape, x.shape[1])
        return (by_choice * topk_weights.float().unsqueeze(2)).sum(1).to(x.dtype)


@functools.cache
def _native() -> build.Functions | None:
    arguments = [*[c_void_p] * 7, *[c_int64] * 7]
    return build.bind({"experts_silu": arguments, "experts_gelu_tanh": arguments})


def _stack(weights: Tensor) -> Tensor:
    """[E, N, K] -> the experts' panels one after another."""
    return torch.cat([linear.pack_panels(weight) for weight in weights])
