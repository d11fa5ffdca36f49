"""y = x @ weight.T + bias, with the weight laid out once for the machine's matrix product.

On CPU, oneDNN's own blocked layout ("prepacked") is 1.2 to 4 times faster than `F.linear` at the row counts of
decoding, because the plain call copies or strides over the weight every time. The plain weight is not kept.

A row's result does not depend on how many rows come with it. oneDNN's sums do not change with the row count from two
rows up (measured from 2 to 1024 over these shapes and dtypes), but one row alone may be summed in another order; so
one row is computed as two, which costs nothing while the weight's bytes are what takes the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain torch: x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    return F.linear(x, weight, bias)


class PackedLinear:
    """A linear layer without a plain weight: call it with x [..., K] to get [..., N].

    weight [N, K] and bias [N] are taken over; drop yours after this, or memory holds both. Where oneDNN has no
    path (CUDA, other dtypes) the plain weight is kept and `F.linear` runs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = bias
        self.is_packed = _can_pack(weight)
        weight = weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        if x.numel() == self.in_features:
            pair = x.reshape(1, -1).expand(2, -1).contiguous()
            return self._multiply(pair)[:1].view(*x.shape[:-1], self.out_features)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
