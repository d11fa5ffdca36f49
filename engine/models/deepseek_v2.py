"""DeepSeek V2 and V2-Lite: latent attention, and after the first layers a mixture beside experts that all tokens share.

    scores = softmax over all experts in float32
    greedy:                the K largest of all
    group_limited_greedy:  experts in equal groups; the K largest of those in the topk_group groups whose best is best
    weights = routed_scaling_factor * scores of the chosen, not renormalised

T tokens of a step, H hidden, V vocabulary, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.layers.latent_attention import LatentAttention, LatentShape
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.mlp import GatedMLP
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.rotary import Rotary, rope_fields
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place


class SparseMLP(nn.Module):
    """x [T, H] -> the weighted sum of each token's chosen experts plus the shared ones [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        count, width = text.integer("n_routed_experts"), text.integer("moe_intermediate_size")
        self.top_k = text.integer("num_experts_per_tok")
        self.scaling = text.number("routed_scaling_factor", 1.0)
        self.groups, self.kept_groups = expert_groups(text, count)
        if self.top_k > count // self.groups * self.kept_groups:
            raise BadModelConfig(f"{text.where}: num_experts_per_tok is {self.top_k}, more than the groups left hold")
        # Scores in bfloat16 would tie, and what ties is chosen by chance.
        self.router = Linear(hidden, {"gate": count}, place=replace(place.exact, dtype=torch.float32))
        self.experts = Experts(count, hidden, width, "silu", place=place)
        shared = text.integer("n_shared_experts")
        self.shared_experts = GatedMLP(hidden, width * shared, "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x.float()).softmax(dim=-1)
        if self.kept_groups < self.groups:
            best = scores.unflatten(-1, (self.groups, -1)).amax(dim=-1)
            scores = self._within(best.topk(self.kept_groups, dim=-1).indices, scores)
        weights, ids = scores.topk(self.top_k, dim=-1)
        return self.experts(x, ids, weights * self.scaling) + self.shared_experts(x)

    def _within(self, kept: Tensor, scores: Tensor) -> Tensor:
        """scores [T, E] with those outside the groups kept [T, topk_group] set to 0."""
        is_kept = torch.zeros(len(scores), self.groups, dtype=torch.bool, device=scores.device).scatter_(1, kept, True)
        grouped = scores.unflatten(-1, (self.groups, -1))
        return grouped.masked_fill(~is_kept.unsqueeze(-1), 0.0).flatten(1)


def expert_groups(text: Fields, count: int) -> tuple[int, int]:
    """(groups, groups that a token may choose from); (1, 1) for the method that knows no groups."""
    text.refuse("scoring_func", "softmax")
    text.refuse("topk_method", "greedy", "group_limited_greedy")
    if text.text("topk_method", "greedy") == "greedy":
        return 1, 1
    groups, kept = text.integer("n_group"), text.integer("topk_group")
    if count % groups or kept > groups:
        raise BadModelConfig(f"{text.where}: n_group {groups} and topk_group {kept} do not fit {count} experts")
    return groups, kept


class Block(nn.Module):
    """Attention and a dense or sparse MLP, each on the norm of the residual stream."""

    def __init__(self, text: Fields, shape: LatentShape, index: int, *, place: Place) -> None:
        super().__init__()
        self.self_attn = LatentAttention(shape, index, place=place)
        self.mlp: nn.Module
        if is_sparse(text, index):
            self.mlp = SparseMLP(text, shape.hidden, place=place)
        else:
            self.mlp = GatedMLP(shape.hidden, text.integer("intermediate_size"), "silu", place=place)
        eps = text.number("rms_norm_eps", 1e-6)
        self.input_layernorm = RMSNorm(shape.hidden, eps, "llama", place=place)
        self.post_attention_layernorm = RMSNorm(shape.hidden, eps, "llama", place=place)

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


def is_sparse(text: Fields, index: int) -> bool:
    """Whether layer `index` has experts: from first_k_dense_replace on, every moe_layer_freq-th."""
    first, step = text.integer("first_k_dense_replace", 0, least=0), text.integer("moe_layer_freq", 1)
    return index >= first and index % step == 0


class DeepseekV2ForCausalLM(Decoder):
    """The whole model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        text.refuse("mlp_bias", False)
        self.shape = shape = LatentShape.read(text, pairs=True)
        vocab, count = text.integer("vocab_size"), text.integer("num_hidden_layers")
        self.embed_tokens = Embedding(vocab, shape.hidden, place=place)
        self.layers = nn.ModuleList(Block(text, shape, index, place=place) for index in range(count))
        self.norm = RMSNorm(shape.hidden, text.number("rms_norm_eps", 1e-6), "llama", place=place)
        tied = self.embed_tokens if text.boolean("tie_word_embeddings", False) else None
        self.lm_head = Head(vocab, shape.hidden, tied=tied, place=place)
        longest = text.integer("max_position_embeddings")
        self.rotary = Rotary(rope_fields(text), shape.rope, longest, device=place.device)

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec((self.shape.cache,) * len(self.layers))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual
