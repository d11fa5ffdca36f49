"""Causal attention over latents that lie in blocks of a paged cache: multi-head latent attention, absorbed.

A token's latent is one vector for all heads: its first `rank` numbers stand for keys and values, the rest are the
turned part of the keys. Queries come with the key projection absorbed, results leave before the value projection.

    out[i, j] = softmax(scale * q[i, j] . L[:pos+1]) @ L[:pos+1, :rank]        pos = position of token i in its context

The batch is ragged as in kernels/paged_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    out = torch.zeros_like(q[..., :rank])
    starts = query_start.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        blocks = block_tables[row, : -(-length // cache.shape[1])].long()
        latents = cache[blocks].flatten(0, 1)[:length].float()
        scores = torch.einsum("nhd,md->hnm", q[begin:end].float(), latents) * scale
        position = torch.arange(length - (end - begin), length, device=q.device).unsqueeze(1)
        unseen = torch.arange(length, device=q.device).unsqueeze(0) > position
        weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
        out[begin:end] = torch.einsum("hnm,md->nhd", weights, latents[:, :rank]).to(q.dtype)
    return out


def write_latent(latent: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Put latent [T, D] into the cache [blocks, block_size, D] at slot_mapping [T] int64; negative: nowhere."""
    kept = slot_mapping >= 0
    cache.view(-1, cache.shape[-1])[slot_mapping[kept]] = latent[kept].to(cache.dtype)


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
    """q [T, h, D], cache [blocks, block_size, D], tables and lengths as in `paged_attention` -> [T, h, rank] like q."""
    return reference(q, cache, block_tables, query_start, seq_lens, rank=rank, scale=scale)
