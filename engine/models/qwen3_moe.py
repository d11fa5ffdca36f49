"""Qwen3 mixture of experts: the attention of Qwen3, and K of E small MLPs per token in most layers.

    router: softmax over all experts in float32, the K largest, renormalised to sum 1 if norm_topk_prob says so

T tokens of a step, H hidden, V vocabulary, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape, HeadNormAttention, sliding_window
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.mlp import GatedMLP
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.rotary import Rotary, rope_fields
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight


class SparseMLP(nn.Module):
    """x [T, H] -> the weighted sum of each token's chosen experts [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        count = num_experts(text)
        self.top_k = text.integer("num_experts_per_tok", 8)
        if self.top_k > count:
            raise BadModelConfig(f"{text.where}: num_experts_per_tok is {self.top_k}, more than the {count} experts")
        self.renormalise = text.boolean("norm_topk_prob", False)
        self.router = Linear(hidden, {"gate": count}, place=place.exact)
        width = text.integer("moe_intermediate_size", 768)
        self.experts = Experts(count, hidden, width, "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, ids, weights.to(x.dtype))


class Block(nn.Module):
    """Attention and a dense or sparse MLP, each on the norm of the residual stream."""

    def __init__(self, text: Fields, shape: AttentionShape, index: int, *, place: Place) -> None:
        super().__init__()
        self.self_attn = HeadNormAttention(shape, index, place=place)
        self.mlp: nn.Module
        if is_sparse(text, index):
            self.mlp = SparseMLP(text, shape.hidden, place=place)
        else:
            self.mlp = GatedMLP(shape.hidden, text.integer("intermediate_size"), "silu", place=place)
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


class Qwen3MoeForCausalLM(Decoder):
    """The whole mixture model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        default_head_dim = text.integer("hidden_size") // text.integer("num_attention_heads")
        self.shape = shape = AttentionShape.read(text, default_head_dim=default_head_dim)
        self.window = sliding_window(text)  # unlike in the dense model, for every layer
        vocab, count = text.integer("vocab_size"), text.integer("num_hidden_layers")
        self.num_kv_heads = place.group.kv_heads(shape.num_kv_heads)
        self.embed_tokens = Embedding(vocab, shape.hidden, place=place)
        self.layers = nn.ModuleList(Block(text, shape, index, place=place) for index in range(count))
        self.norm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)
        tied = self.embed_tokens if text.boolean("tie_word_embeddings", False) else None
        self.lm_head = Head(vocab, shape.hidden, tied=tied, place=place)
        self.rotary = Rotary(
            rope_fields(text), shape.head_dim, text.integer("max_position_embeddings"), device=place.device
        )

    @property
    def cache_spec(self) -> CacheSpec:
        layer = KeyValues(self.num_kv_heads, self.shape.head_dim, Sight(self.window))
        return CacheSpec((layer,) * len(self.layers))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual


def num_experts(text: Fields) -> int:
    """transformers 5 writes num_local_experts where the hub's files say num_experts."""
    return text.integer("num_experts", text.integer("num_local_experts", 128, least=0), least=0)


def is_sparse(text: Fields, index: int) -> bool:
    """Whether layer `index` has experts: every decoder_sparse_step-th one that mlp_only_layers does not exempt."""
    exempt = text.list_of(int, "mlp_only_layers", [])
    step = text.integer("decoder_sparse_step", 1)
    return index not in exempt and num_experts(text) > 0 and (index + 1) % step == 0
