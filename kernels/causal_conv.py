"""A depthwise causal convolution over a ragged batch, then silu: each channel mixes a row's last K inputs.

    y[t, c] = silu( sum_j weight[j, c] * x[t - (K-1) + j, c] )       sum in float32, rounded before silu

What lies before a row's first token of this step comes from its state: the K-1 inputs before it, oldest first.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from inferfleet.kernels import build, threads


def reference(x: Tensor, weight: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor) -> Tensor:
    """The formula in plain torch, a row at a time; same arguments as `causal_conv`."""
    out = build.empty_like(x)
    starts = query_start.tolist()
    for slot, begin, end in zip(state_slots.tolist(), starts[:-1], starts[1:], strict=True):
        inputs = torch.cat((state[slot], x[begin:end]))
        windows = inputs.unfold(0, weight.shape[0], 1)  # [n, C, K]
        out[begin:end] = F.silu((windows.float() * weight.t().float()).sum(-1).to(x.dtype))
        state[slot] = inputs[end - begin :]
    return out


def gathered(x: Tensor, weight: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor) -> Tensor:
    """The same for all rows at once, without a look at any number from the host; same arguments as `causal_conv`."""
    tokens, rows, kept = x.shape[0], state_slots.shape[0], weight.shape[0] - 1
    inputs = torch.cat((state[state_slots].flatten(0, 1), x))  # row r's state at r*kept, token t at rows*kept + t
    starts = query_start.to(torch.int64)
    owner = torch.arange(rows, device=x.device).repeat_interleave(starts.diff(), output_size=tokens)

    def at(token: Tensor, row: Tensor) -> Tensor:
        """Where in `inputs` the row's input at `token` lies, which may be up to `kept` before its first."""
        before = token - starts[row]
        return torch.where(before < 0, (row + 1) * kept + before, rows * kept + token)

    here = torch.arange(tokens, device=x.device)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for tap in range(kept + 1):
        total += inputs[at(here - kept + tap, owner)].float() * weight[tap].float()
    places = starts[1:, None] - kept + torch.arange(kept, device=x.device)
    state[state_slots] = inputs[at(places, torch.arange(rows, device=x.device)[:, None])]
    return F.silu(total.to(x.dtype))


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor) -> Tensor:
    """x [T, C], weight [K, C] (oldest tap first) -> [T, C].

    state [slots, K-1, C], in x's dtype, is updated in place: row r owns tokens query_start[r] : query_start[r+1] (int32
    [R+1]) and the state state_slots[r] (int64 [R]); no two rows have the same.
    """
    native = _native() if _takes(x, weight, state) else None
    if native is None:
        return gathered(x, weight, state, state_slots, query_start)
    out = build.empty_like(x)
    native["causal_conv", x.dtype](
        *(tensor.data_ptr() for tensor in (out, x, weight, state, state_slots, query_start)),
        state_slots.shape[0],
        *(weight.shape[1], weight.shape[0]),
        *(x.stride(0), state.stride(0)),
        threads.for_elements(x.numel()),
    )
    return out


@functools.cache
def _native() -> build.Functions | None:
    return build.bind({"causal_conv": [*[c_void_p] * 6, *[c_int64] * 6]})


def _takes(x: Tensor, weight: Tensor, state: Tensor) -> bool:
    if not x.is_cpu or x.dtype not in build.SUFFIXES or not x.dtype == weight.dtype == state.dtype:
        return False
    return x.stride(1) == 1 and weight.is_contiguous() and state[0].is_contiguous()
