"""Grouped-query attention with a norm on every query and key head, as all of Qwen3 has it. Gemma 4 has its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.config import Fields
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.place import Place


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    bias: bool

    @classmethod
    def read(cls, text: Fields, *, default_head_dim: int) -> AttentionShape:
        """From config.json's usual names; the families differ in what an absent head_dim means."""
        heads = text.integer("num_attention_heads")
        kv_heads = text.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise BadModelConfig(f"{text.where}: {heads} attention heads do not divide by {kv_heads} key/value heads")
        return cls(
            hidden=text.integer("hidden_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=text.integer("head_dim", default_head_dim),
            eps=text.number("rms_norm_eps", 1e-6),
            bias=text.boolean("attention_bias", False),
        )


def sliding_window(text: Fields) -> int | None:
    """The window of a model's windowed layers; None where use_sliding_window or a null size turns it off."""
    if not text.boolean("use_sliding_window", False) or text.values.get("sliding_window", 4096) is None:
        return None
    return text.integer("sliding_window", 4096)


class HeadNormAttention(nn.Module):
    """x [T, H] -> [T, H]: projections, head norms, rotary, attention over the row's context, output projection.

    In a split model each rank has some of the heads: num_heads and num_kv_heads are its own.
    """

    def __init__(self, shape: AttentionShape, index: int, *, place: Place) -> None:
        """index: this layer's place in the model's CacheSpec."""
        super().__init__()
        self.index, self.head_dim = index, shape.head_dim
        heads, kv_heads = place.group.heads(shape.num_heads, shape.num_kv_heads)
        self.num_heads, self.num_kv_heads = heads.size, kv_heads.size
        q_size, kv_size = heads.times(shape.head_dim), kv_heads.times(shape.head_dim)
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = Linear(shape.hidden, parts, bias=shape.bias, place=place)
        self.output = Linear(q_size, {"o_proj": shape.hidden}, bias=shape.bias, place=place)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps, "llama", place=place)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps, "llama", place=place)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        q, k, v = self.qkv(x).split(self.qkv.sizes, dim=1)
        q = self.q_norm.then_rotary(q.view(tokens, self.num_heads, d), cos, sin)
        k = self.k_norm.then_rotary(k.view(tokens, self.num_kv_heads, d), cos, sin)
        out = batch.attend(self.index, q, k, v.view(tokens, self.num_kv_heads, d), scale=d**-0.5)
        return self.output(out.view(tokens, -1))
