"""A linear map of its own for each head: out[t, h] = x[t, h] @ weight[h].T, as latent attention needs twice a layer.

On CPU every head's weight is packed at load as csrc/product.h describes, so that one call multiplies all heads and a
token's result does not depend on the tokens beside it, which a batched product of torch does not promise.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, linear, threads


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The formula in plain torch: x [T, heads, K], weight [heads, N, K] -> [T, heads, N]."""
    return torch.matmul(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


class PackedHeads:
    """Call it with x [T, heads, K] to get [T, heads, N]; weight [heads, N, K] is taken over, as in PackedLinear."""

    def __init__(self, weight: Tensor) -> None:
        self.num_heads, self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        packs = weight.is_cpu and weight.dtype in build.SUFFIXES and _native() is not None
        self.layout = "panels" if packs else "plain"
        self.weight = torch.cat([linear.pack_panels(head) for head in weight]) if packs else weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype or x.shape[1:] != (self.num_heads, self.in_features):
            wanted = f"[T, {self.num_heads}, {self.in_features}] of {self.dtype}"
            raise ValueError(f"this linear of heads takes {wanted}, not {list(x.shape)} of {x.dtype}")
        if self.layout == "plain":
            return reference(x, self.weight)
        native = _native()
        assert native is not None, "the weight lies in panels, so there was a library"
        rows = x if x.stride(2) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], self.num_heads, self.out_features, dtype=self.dtype)
        native["head_linear", self.dtype](
            out.data_ptr(),
            rows.data_ptr(),
            self.weight.data_ptr(),
            x.shape[0],
            self.num_heads,
            self.out_features,
            self.in_features,
            rows.stride(0),
            rows.stride(1),
            threads.for_work(),
        )
        return out


@functools.cache
def _native() -> build.Functions | None:
    return build.bind({"head_linear": [*[c_void_p] * 3, *[c_int64] * 7]})
