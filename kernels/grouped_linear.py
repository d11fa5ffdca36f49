"""One product with a weight for each group: rows sorted by group, each multiplied by its own group's matrix.

    out[i] = weight[g] @ x[i]      for the rows offsets[g] <= i < offsets[g + 1] of group g

A mixture of experts is two of these with an activation between. Which rows belong to which group stays a tensor: on
CUDA nothing here waits for the device. There one Triton kernel computes every group (kernels/grouped_linear_triton.py),
and a row's result does not depend on the other rows; the same holds for oneDNN's layout (see kernels/linear.py). The
plain product of torch on a CPU may sum a row in another order when other rows come with it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import linear, on_cuda, threads
from inferfleet.kernels.linear import PackedLinear

#: Bytes that torch's own grouped product wants every row to be a multiple of.
_ROW_ALIGNMENT = 16


def reference(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """The formula in plain torch, a group that has rows at a time; same arguments as `grouped_linear`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for group, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            out[begin:end] = F.linear(x[begin:end], weight[group])
    return out


def grouped_linear(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """x [N, K], offsets [G+1] int32 from 0 up to N, weight [G, M, K] -> [N, M]."""
    if (kernel := on_cuda.kernels("grouped_linear_triton", x, weight)) is not None:
        out: Tensor = kernel.grouped_linear(x, offsets, weight)
        return out
    if x.is_cpu and _is_aligned(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
    return reference(x, offsets, weight)


class GroupedLinear:
    """The same product over weights that were laid out once: call it with (x, offsets).

    weight [G, M, K] is taken over; drop yours after this, or memory holds both.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features = weight.shape[1]
        self.layout = linear.best_layout(weight)
        if self.layout != "plain":
            self.groups = [PackedLinear(matrix) for matrix in weight]
            return
        self.weight = weight.detach()
        if weight.is_cpu:
            threads.lend_to_torch()

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, K] sorted by group, offsets [G+1] int32 -> [N, M]."""
        if self.layout == "plain":
            return grouped_linear(x, offsets, self.weight)
        out = x.new_empty(x.shape[0], self.out_features)
        ends = offsets.tolist()
        # oneDNN's layouts are made for one matrix each, so here every group that has rows is a call of its own.
        for group in offsets.diff().nonzero().flatten().tolist():
            out[ends[group] : ends[group + 1]] = self.groups[group](x[ends[group] : ends[group + 1]])
        return out


def sort_by_group(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Groups [N] of rows -> (order [N] that sorts the rows by group and keeps their order in it, offsets [count+1])."""
    ordered, order = groups.sort(stable=True)
    numbers = torch.arange(count + 1, dtype=ordered.dtype, device=groups.device)
    return order, torch.searchsorted(ordered, numbers, out_int32=True)


def _is_aligned(x: Tensor, weight: Tensor) -> bool:
    if x.stride(1) != 1 or not weight.is_contiguous() or x.shape[0] == 0:
        return False
    rows = (x.stride(0), weight.shape[2], weight.shape[1])
    return all(row * x.element_size() % _ROW_ALIGNMENT == 0 for row in rows)
