"""Causal attention of many heads over one latent vector a token, which lies in blocks of a paged cache.

The latents are what multi-head latent attention keeps of a token: a compressed part of R numbers, from which every
head's key and value follow by a matrix of its own, and a rotary part of P numbers that all heads share. Those matrices
are absorbed into the query before and into the output after, so that neither keys nor values are ever expanded:

    out[i] = softmax(scale * q[i] . C[0:pos+1]) @ C[0:pos+1, :R]      q [T, h, R+P], C the row's latents [m, R+P]

A batch is ragged as in paged_attention.py: row r owns the query tokens query_start[r] : query_start[r+1], the *last*
tokens of a context of seq_lens[r]; token t of the context lies in block block_tables[r, t // block_size] at
t % block_size. The softmax is in float32.
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from inferfleet.kernels import build, on_cuda, threads


def write_reference(latent: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Scatter in plain torch; same arguments as `write_latent`."""
    kept = slot_mapping >= 0
    cache.view(-1, cache.shape[2])[slot_mapping[kept]] = latent[kept].to(cache.dtype)


def reference(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    rank: int,
    scale: float,
) -> Tensor:
    """The formula in plain torch, a row at a time; same arguments as `latent_attention`."""
    out = torch.zeros(*q.shape[:2], rank, dtype=q.dtype, device=q.device)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for row, length in enumerate(lengths):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        blocks = block_tables[row, : -(-length // cache.shape[1])].long()
        latents = cache[blocks].flatten(0, 1)[:length].float()
        out[begin:end] = _attend(q[begin:end].float(), latents, rank, scale).to(q.dtype)
    return out


def _attend(q: Tensor, latents: Tensor, rank: int, scale: float) -> Tensor:
    """One row: q [n, h, R+P] are the last n of the m tokens of latents [m, R+P] -> [n, h, R]."""
    n, m = q.shape[0], latents.shape[0]
    scores = torch.einsum("nhw,mw->hnm", q, latents) * scale
    hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mr->nhr", weights, latents[:, :rank])


def write_latent(latent: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Put latent [T, R+P] into cache [blocks, block_size, R+P] at slot_mapping [T] int64.

    A slot is block * block_size + offset; a negative slot is skipped (padding).
    """
    if (kernel := on_cuda.kernels("latent_attention_triton", latent, cache)) is not None:
        kernel.write_latent(latent, cache, slot_mapping)
        return
    native = _native() if _on_cpu(latent, cache) and latent.stride(1) == 1 else None
    if native is None or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        write_reference(latent, cache, slot_mapping)
        return
    native["write_latent", latent.dtype](
        latent.data_ptr(),
        cache.data_ptr(),
        slot_mapping.data_ptr(),
        *latent.shape,
        latent.stride(0),
        threads.for_elements(latent.numel()),
    )


def latent_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    rank: int,
    scale: float,
) -> Tensor:
    """Attention of a ragged batch against a paged cache of latents -> [T, h, rank], dtype like q.

    q [T, h, R+P], the absorbed query; cache [blocks, block_size, R+P]; block_tables [R, max_blocks] int32; query_start
    [R+1] int32; seq_lens [R] int32, the context including this step's tokens; rank is R.
    A token's result does not depend on the other rows, nor, but for the reference, on how its prompt was cut into
    steps: a step of one token gives the same bits as the whole prompt at once.
    """
    if (kernel := on_cuda.kernels("latent_attention_triton", q, cache)) is not None:
        result: Tensor = kernel.latent_attention(q, cache, block_tables, query_start, seq_lens, rank=rank, scale=scale)
        return result
    native = _native() if _takes(q, cache) else None
    if native is None:
        return reference(q, cache, block_tables, query_start, seq_lens, rank=rank, scale=scale)
    tables, starts, lengths = _int32(block_tables), _int32(query_start), _int32(seq_lens)
    out = torch.empty(*q.shape[:2], rank, dtype=q.dtype)
    native["latent_attention", q.dtype](
        out.data_ptr(),
        q.data_ptr(),
        cache.data_ptr(),
        tables.data_ptr(),
        starts.data_ptr(),
        lengths.data_ptr(),
        lengths.shape[0],
        q.shape[1],
        q.shape[2],
        rank,
        cache.shape[1],
        tables.shape[1],
        q.stride(0),
        scale,
        threads.for_work(),
    )
    return out


@functools.cache
def _native() -> build.Functions | None:
    write = [*[c_void_p] * 3, *[c_int64] * 4]
    attend = [*[c_void_p] * 6, *[c_int64] * 7, c_float, c_int64]
    return build.bind({"write_latent": write, "latent_attention": attend})


def _on_cpu(x: Tensor, cache: Tensor) -> bool:
    if not x.is_cpu or x.dtype not in build.SUFFIXES or cache.dtype is not x.dtype:
        return False
    return cache.is_contiguous() and x.shape[-1] == cache.shape[2]


def _takes(q: Tensor, cache: Tensor) -> bool:
    """Whether the C++ path can read q [T, heads, R+P], heads side by side, against this cache."""
    width = q.shape[2]
    if not _on_cpu(q, cache) or q.stride(2) != 1 or (q.stride(1) != width and q.shape[1] > 1):
        return False
    return q.dtype is torch.float32 or width % 2 == 0  # bfloat16 is multiplied in pairs


def _int32(numbers: Tensor) -> Tensor:
    fits = numbers.dtype is torch.int32 and numbers.is_contiguous()
    return numbers if fits else numbers.to(torch.int32).contiguous()
