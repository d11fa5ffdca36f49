"""Attention as Gemma 3n and 4 have it: no scale, norms on q, k and v, and layers that read another layer's k and v."""

from __future__ import annotations

from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.layers.attention import AttentionShape
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.place import Place
from inferfleet.kernels.rms_norm import rms_norm


class GemmaAttention(nn.Module):
    """x [T, H] -> [T, H]: q and k are normalised with a weight and turned, v is normalised without one; scale 1."""

    #: What keys and values are made of, key first.
    projections: tuple[str, ...] = ("k_proj", "v_proj")

    def __init__(self, shape: AttentionShape, cache_index: int, *, owns_kv: bool, place: Place) -> None:
        """cache_index: place in the CacheSpec of the layer whose keys and values are read; owns_kv: it is this one."""
        super().__init__()
        heads, kv_heads = place.group.heads(shape.num_heads, shape.num_kv_heads)
        self.num_heads, self.num_kv_heads, self.head_dim = heads.size, kv_heads.size, shape.head_dim
        self.cache_index, self.eps = cache_index, shape.eps
        q_size, kv_size = heads.times(shape.head_dim), kv_heads.times(shape.head_dim)
        parts = {"q_proj": q_size} | (dict.fromkeys(self.projections, kv_size) if owns_kv else {})
        self.qkv = Linear(shape.hidden, parts, bias=shape.bias, place=place)
        self.output = Linear(q_size, {"o_proj": shape.hidden}, bias=shape.bias, place=place)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps, "gemma", place=place)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps, "gemma", place=place) if owns_kv else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        tokens = x.shape[0]
        q, *kv = self.qkv(x).split(self.qkv.sizes, dim=1)
        q = self.q_norm.then_rotary(q.view(tokens, self.num_heads, self.head_dim), cos, sin)
        k, v = self._keys_and_values(kv, cos, sin)
        out = batch.attend(self.cache_index, q, k, v, scale=1.0)
        return self.output(out.view(tokens, -1))

    def _keys_and_values(self, kv: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """k, v [T, kv, d], or None twice in a layer that reads another's. V comes from the last part, un-normed."""
        if self.k_norm is None:
            return None, None
        raw = [part.view(-1, self.num_kv_heads, self.head_dim) for part in kv]
        return self.k_norm.then_rotary(raw[0], cos, sin), rms_norm(raw[-1], None, self.eps, style="gemma")
