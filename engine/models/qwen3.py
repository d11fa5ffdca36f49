"""Qwen3, dense: pre-norm blocks, a norm on every query and key head before rotary, SwiGLU.

T tokens of a step, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape, HeadNormAttention, sliding_window
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.mlp import GatedMLP
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.rotary import Rotary, rope_fields
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight


class Block(nn.Module):
    """Attention and an MLP, each on the norm of the residual stream."""

    def __init__(self, shape: AttentionShape, intermediate: int, index: int, *, place: Place) -> None:
        super().__init__()
        self.self_attn = HeadNormAttention(shape, index, place=place)
        self.mlp = GatedMLP(shape.hidden, intermediate, "silu", place=place)
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)

    def forward(
        self, branch: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives (last branch, residual) apart, because adding them is half of the next norm."""
        if residual is None:
            normed, residual = self.input_layernorm(branch), branch
        else:
            normed, residual = self.input_layernorm.after_add(branch, residual)
        attended = self.self_attn(normed, cos, sin, batch)
        normed, residual = self.post_attention_layernorm.after_add(attended, residual)
        return self.mlp(normed), residual


class Qwen3ForCausalLM(Decoder):
    """The whole dense model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        self.shape = shape = AttentionShape.read(text, default_head_dim=128)
        self.windows = layer_windows(text)
        vocab, intermediate = text.integer("vocab_size"), text.integer("intermediate_size")
        self.num_kv_heads = place.group.kv_heads(shape.num_kv_heads)
        self.embed_tokens = Embedding(vocab, shape.hidden, place=place)
        self.layers = nn.ModuleList(
            Block(shape, intermediate, index, place=place) for index in range(len(self.windows))
        )
        self.norm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)
        tied = self.embed_tokens if text.boolean("tie_word_embeddings", False) else None
        self.lm_head = Head(vocab, shape.hidden, tied=tied, place=place)
        self.rotary = Rotary(
            rope_fields(text), shape.head_dim, text.integer("max_position_embeddings"), device=place.device
        )

    @property
    def cache_spec(self) -> CacheSpec:
        kv_heads, d = self.num_kv_heads, self.shape.head_dim
        return CacheSpec(tuple(KeyValues(kv_heads, d, Sight(window)) for window in self.windows))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual


def layer_windows(text: Fields) -> tuple[int | None, ...]:
    """The window of each layer: use_sliding_window turns it on, layer_types or max_window_layers say where."""
    count = text.integer("num_hidden_layers")
    window = sliding_window(text)
    first = text.integer("max_window_layers", 28, least=0)
    default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    kinds = text.list_of(str, "layer_types", default)
    if len(kinds) != count or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise BadModelConfig(f"{text.where}: layer_types must hold {count} x sliding_attention or full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
