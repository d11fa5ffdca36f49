"""A cache without blocks: `paged_attn=False`. One stretch of memory a row, attention written out in float32 torch.

It has the face of PagedCache and runs the same models, so that it checks block tables, slot mappings and kernels
rather than repeats them. Its blocks are as long as the longest context; block b of the tables is stretch b - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inferfleet.engine.cache import PagedCache
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent
from inferfleet.engine.sight import Sight

if TYPE_CHECKING:
    from inferfleet.engine.batch import Batch


class ContiguousCache(PagedCache):
    """Keys, values and latents of a row side by side; no null block."""

    def __init__(
        self,
        spec: CacheSpec,
        num_blocks: Sequence[int],
        block_size: int,
        *,
        num_states: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        counts = [count - 1 for count in num_blocks]
        super().__init__(spec, counts, block_size, num_states=num_states, dtype=dtype, device=device)

    def attend(self, batch: Batch, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
        kind, (keys, values) = self.spec.layers[layer], self.blocks[layer]
        assert isinstance(kind, KeyValues), "attend is for layers with keys and values"
        out = torch.empty_like(q)
        for stretch, tokens, context in _rows(batch, self.spec.group_of(kind)):
            if k is not None and v is not None:
                written = slice(context - (tokens.stop - tokens.start), context)
                keys[stretch, written], values[stretch, written] = k[tokens], v[tokens]
            out[tokens] = _attend_row(q[tokens], keys[stretch, :context], values[stretch, :context], scale, kind.sight)
        return out

    def attend_latent(self, batch: Batch, layer: int, q: Tensor, latent: Tensor, scale: float) -> Tensor:
        kind, (latents,) = self.spec.layers[layer], self.blocks[layer]
        assert isinstance(kind, Latent), "attend_latent is for layers with a latent"
        out = torch.empty_like(q[..., : kind.rank])
        for stretch, tokens, context in _rows(batch, self.spec.group_of(kind)):
            latents[stretch, context - (tokens.stop - tokens.start) : context] = latent[tokens]
            # To attention a latent is one head's key, and its first part that head's value.
            keys = latents[stretch, :context].unsqueeze(1)
            out[tokens] = _attend_row(q[tokens], keys, keys[..., : kind.rank], scale, kind.sight)
        return out


def _rows(batch: Batch, group: int) -> Iterator[tuple[int, slice, int]]:
    """(stretch, its tokens in the step, length of its context) of every row."""
    begin = 0
    for row, (query_len, context) in enumerate(batch.row_lens):
        yield int(batch.block_tables[group][row, 0]) - 1, slice(begin, begin + query_len), context
        begin += query_len


def _attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> Tensor:
    """q [n, h, d] are the last n of the m tokens in k [m, kv, d] and v [m, kv, e] -> [n, h, e] in q's dtype."""
    (n, h, d), (m, kv, e) = q.shape, v.shape
    grouped = q.float().reshape(n, kv, h // kv, d)
    scores = torch.einsum("nkgd,mkd->kgnm", grouped, k.float()) * scale
    query = torch.arange(m - n, m, device=q.device)
    first = torch.tensor([sight.first_key(position) for position in range(m - n, m)], device=q.device)
    key = torch.arange(m, device=q.device)
    hidden = (key > query[:, None]) | (key < first[:, None])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgnm,mke->nkge", weights, v.float()).reshape(n, h, e).to(q.dtype)
