"""Causal attention over keys and values that lie in blocks of a paged cache; prefill and decode rows in one call.

A batch is ragged: row r owns the query tokens query_start[r] : query_start[r+1], which are the *last* tokens of a
context of seq_lens[r]. Token t of the context lies in block block_tables[r, t // block_size] at t % block_size.

    out[i] = softmax(scale * q[i] . K[lo:pos+1]) @ V[lo:pos+1]     pos = position of token i in its context
                                                                   lo  = 0, or the first key that token i sees
with query head j reading kv head j // (heads / kv_heads), and the softmax in float32. A window of W shows a token
the last W keys, its own among them; a chunk of C those of its own chunk, whose positions have the same pos // C. Blocks
wholly behind what a row's queries see are never read, so their table entries may be stale.
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p
from types import ModuleType

import torch
from torch import Tensor

from inferfleet.kernels import build, on_cuda, threads


def write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatter in plain torch; same arguments as `write_kv`."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k[kept].to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v[kept].to(v_cache.dtype)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The formula in plain torch, a row at a time; same arguments as `paged_attention`."""
    out = torch.zeros_like(q)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        first_query = length - (end - begin)
        low = _first_key(first_query, window, chunk)
        keys = _gather(k_cache, block_tables[row], low, length)
        values = _gather(v_cache, block_tables[row], low, length)
        out[begin:end] = _attend(q[begin:end], keys, values, first_query, low, scale, window, chunk)
    return out


def _first_key(position: int, window: int | None, chunk: int | None) -> int:
    of_window = 0 if window is None else max(0, position - window + 1)
    return of_window if chunk is None else max(of_window, position // chunk * chunk)


def _gather(cache: Tensor, table: Tensor, low: int, high: int) -> Tensor:
    """Tokens low..high-1 of one row's context: [high - low, kv_heads, D]."""
    block_size = cache.shape[1]
    first_block = low // block_size
    blocks = table[first_block : -(-high // block_size)].long()
    tokens = cache[blocks].flatten(0, 1)
    return tokens[low - first_block * block_size : high - first_block * block_size]


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    low: int,
    scale: float,
    window: int | None,
    chunk: int | None,
) -> Tensor:
    """One row: q [n, h, D] of positions first.., keys and values [m, kv, D] of positions low.. -> [n, h, D]."""
    group = q.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    position = torch.arange(first, first + q.shape[0], device=q.device).unsqueeze(1)
    key = torch.arange(low, low + keys.shape[0], device=q.device).unsqueeze(0)
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    if chunk is not None:
        seen &= key >= position // chunk * chunk
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put k and v [T, kv_heads, D] into the caches [blocks, block_size, kv_heads, D] at slot_mapping [T] int64.

    A slot is block * block_size + offset; a negative slot is skipped (padding).
    """
    if (kernel := _triton(k, k_cache, v_cache)) is not None:
        kernel.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    native = _native() if _takes(k, k_cache, v_cache) and _takes(v, v_cache, k_cache) else None
    if native is None or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        write_reference(k, v, k_cache, v_cache, slot_mapping)
        return
    tokens, width = k.shape[0], k.shape[1] * k.shape[2]
    native["write_kv", k.dtype](
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        tokens,
        width,
        k.stride(0),
        v.stride(0),
        threads.for_elements(tokens * width),
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """Attention of a ragged batch against a paged cache -> [T, h, D] like q.

    q [T, h, D]; k_cache, v_cache [blocks, block_size, kv_heads, D] with h a multiple of kv_heads; block_tables
    [R, max_blocks] int32; query_start [R+1] int32; seq_lens [R] int32, the context including this step's tokens.
    max_query_len (longest row of this batch) tells the CUDA path whether there are rows of more than one token.
    A token's result does not depend on the other rows, nor in the C++ path on how its prompt was cut into steps
    (but for a step of one token, which is computed as decoding is).
    """
    batch = (q, k_cache, v_cache, block_tables, query_start, seq_lens)
    if (kernel := _triton(q, k_cache, v_cache)) is not None:
        sight = {"window": window, "chunk": chunk}
        result: Tensor = kernel.paged_attention(*batch, scale=scale, **sight, max_query_len=max_query_len)
        return result
    native = _native() if _takes(q, k_cache, v_cache) else None
    if native is None:
        return reference(*batch, scale=scale, window=window, chunk=chunk)
    tables, starts, lengths = _int32(block_tables), _int32(query_start), _int32(seq_lens)
    out = build.empty_like(q)
    native["paged_attention", q.dtype](
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        tables.data_ptr(),
        starts.data_ptr(),
        lengths.data_ptr(),
        lengths.shape[0],
        q.shape[1],
        k_cache.shape[2],
        q.shape[2],
        k_cache.shape[1],
        tables.shape[1],
        q.stride(0),
        window or 0,
        chunk or 0,
        scale,
        threads.for_work(),
    )
    return out


@functools.cache
def _native() -> build.Functions | None:
    pointers = [c_void_p] * 5
    write = [*pointers, *[c_int64] * 5]
    attend = [*pointers, c_void_p, c_void_p, *[c_int64] * 9, c_float, c_int64]
    return build.bind({"write_kv": write, "paged_attention": attend})


def _triton(x: Tensor, cache: Tensor, other: Tensor) -> ModuleType | None:
    """The kernels in Triton, if they can read x [T, heads, D] against these caches."""
    if (
        x.shape[2] != cache.shape[3]
        or not cache.is_contiguous()
        or not other.is_contiguous()
        or cache.shape != other.shape
    ):
        return None
    return on_cuda.kernels("paged_attention_triton", x, cache, other)


def _takes(x: Tensor, cache: Tensor, other: Tensor) -> bool:
    """Whether the C++ path can read x [T, heads, D], heads side by side, against these caches."""
    dtype, width = x.dtype, x.shape[2]
    if not x.is_cpu or dtype not in build.SUFFIXES or cache.dtype is not dtype or other.dtype is not dtype:
        return False
    if x.stride(2) != 1 or (x.stride(1) != width and x.shape[1] > 1) or width != cache.shape[3]:
        return False
    return cache.is_contiguous() and other.is_contiguous() and cache.shape == other.shape


def _int32(numbers: Tensor) -> Tensor:
    fits = numbers.dtype is torch.int32 and numbers.is_contiguous()
    return numbers if fits else numbers.to(torch.int32).contiguous()
