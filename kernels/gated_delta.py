"""The gated delta rule over a ragged batch: each row reads and corrects a matrix it carries from step to step.

    S <- exp(g) S                     S [dk, dv], one per value head, float32
    S <- S + k (beta (v - S^T k))^T   what S holds for the key k moves towards v
    o  = S^T q                        q, k at length 1, q then by dk^-0.5

Key head j serves the hv/hk value heads from j*hv/hk on. `reference` goes token by token; `chunked` does the same with
matrix products over up to CHUNK tokens at once, for devices that have no compiled form.
"""

from __future__ import annotations

import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, threads

CHUNK = 64
EPSILON = 1e-6  # beside the squared length, as in csrc/gated_delta.cpp


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor
) -> Tensor:
    """The formula in plain torch, token by token; same arguments as `gated_delta`."""
    q32, k32 = _unit_heads(q, k, v.shape[1])
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for slot, begin, end in _rows(state_slots, query_start):
        for token in range(begin, end):
            one = slice(token, token + 1)
            out[one] = _meet(
                q32[one], k32[one], v[one].float(), g[one], beta[one], state, state_slots.new_tensor([slot])
            )
    return out


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor
) -> Tensor:
    """The same by matrix products, up to CHUNK tokens of a row at once; same arguments as `gated_delta`."""
    q32, k32 = (x.transpose(0, 1) for x in _unit_heads(q, k, v.shape[1]))
    v32, g32, beta32 = v.float().transpose(0, 1), g.t(), beta.t()
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for slot, begin, end in _rows(state_slots, query_start):
        for first in range(begin, end, CHUNK):
            some = slice(first, min(first + CHUNK, end))
            qkv = q32[:, some], k32[:, some], v32[:, some]
            read, state[slot] = _meet_chunk(*qkv, g32[:, some], beta32[:, some], state[slot])
            out[some] = read.transpose(0, 1)
    return out


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, state_slots: Tensor, query_start: Tensor
) -> Tensor:
    """q, k [T, hk, dk], v [T, hv, dv], g and beta [T, hv] float32 -> [T, hv, dv] like v.

    state [slots, hv, dk, dv] float32 is updated in place: row r owns tokens query_start[r] : query_start[r+1] (int32
    [R+1]) and the state state_slots[r] (int64 [R]); no two rows have the same. A row's result depends on no other row.
    """
    native = _native() if _takes(q, k, v, g, beta, state) else None
    if native is not None:
        return _call(native, q, k, v, g, beta, state, state_slots, query_start)
    if q.shape[0] == state_slots.shape[0]:  # a token each: all rows at once
        q32, k32 = _unit_heads(q, k, v.shape[1])
        return _meet(q32, k32, v.float(), g, beta, state, state_slots).to(v.dtype)
    return chunked(q, k, v, g, beta, state, state_slots, query_start)


def _unit_heads(q: Tensor, k: Tensor, value_heads: int) -> tuple[Tensor, Tensor]:
    """q and k [T, hk, dk] -> float32 [T, hv, dk], at length 1 and q scaled."""
    each = value_heads // k.shape[1]

    def unit(x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + EPSILON)).repeat_interleave(each, dim=1)

    return unit(q) * q.shape[-1] ** -0.5, unit(k)


def _rows(state_slots: Tensor, query_start: Tensor) -> list[tuple[int, int, int]]:
    starts = query_start.tolist()
    return list(zip(state_slots.tolist(), starts[:-1], starts[1:], strict=True))


def _meet(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """One token of each of R states: q, k [R, hv, dk], v [R, hv, dv], g and beta [R, hv] -> [R, hv, dv]."""
    held = state[slots] * g.exp()[..., None, None]
    change = (v - (held * k.unsqueeze(-1)).sum(-2)) * beta.unsqueeze(-1)
    held = held + k.unsqueeze(-1) * change.unsqueeze(-2)
    state[slots] = held
    return (held * q.unsqueeze(-1)).sum(-2)


def _meet_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """C tokens of one state: q, k [hv, C, dk], v [hv, C, dv], g and beta [hv, C] -> ([hv, C, dv], state after them).

    Token i writes k_i c_i^T with c_i = beta_i (v_i - what S holds for k_i), and S has by then the c_j of all j < i:
    that is a triangular system for all c at once.
    """
    faded = g.cumsum(-1)  # log of what is left at token i of the state before the chunk
    between = (faded.unsqueeze(-1) - faded.unsqueeze(-2)).tril().exp().tril()  # and at i of what j wrote
    start = faded.exp().unsqueeze(-1)
    overlap = (k @ k.mT) * between * beta.unsqueeze(-1)
    wanted = (v - start * (k @ state)) * beta.unsqueeze(-1)
    change = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    read = start * (q @ state) + ((q @ k.mT) * between) @ change
    left = (faded[:, -1:] - faded).exp().unsqueeze(-1)
    return read, start[:, -1:] * state + (k * left).mT @ change


@functools.cache
def _native() -> build.Functions | None:
    return build.bind({"gated_delta": [*[c_void_p] * 9, *[c_int64] * 10]})


def _takes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> bool:
    if not v.is_cpu or v.dtype not in build.SUFFIXES or not q.dtype == k.dtype == v.dtype:
        return False
    if any(x.stride(2) != 1 or x.stride(1) != x.shape[2] for x in (q, k, v)):
        return False
    if any(x.dtype is not torch.float32 or not x.is_contiguous() for x in (g, beta)):
        return False
    return state.dtype is torch.float32 and state[0].is_contiguous()


def _call(
    native: build.Functions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_slots: Tensor,
    query_start: Tensor,
) -> Tensor:
    out = build.empty_like(v)
    native["gated_delta", v.dtype](
        *(x.data_ptr() for x in (out, q, k, v, g, beta, state, state_slots, query_start)),
        state_slots.shape[0],
        *(k.shape[1], v.shape[1], k.shape[2], v.shape[2]),
        *(x.stride(0) for x in (q, k, v, state)),
        threads.for_elements(v.numel() * k.shape[2]),
    )
    return out
