"""DeepSeek V3 and R1: latent attention, and after the first layers a mixture that balances its experts by a bias.

    scores  = sigmoid of the router's logits in float32
    choice  = scores + e_score_correction_bias
    groups: experts in equal groups; only the topk_group groups whose two best choices sum highest stay
    chosen: the K largest choices of those;  weights = routed_scaling_factor * their scores, without the bias and
    divided by their sum where norm_topk_prob says so

The module that predicts a second token ahead lies in the checkpoint as further layers, which this model skips.

T tokens of a step, H hidden, V vocabulary, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from inferfleet.engine.layers.vector import Vector
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place


class SparseMLP(nn.Module):
    """x [T, H] -> the weighted sum of each token's chosen experts plus the shared ones [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        count, width = text.integer("n_routed_experts"), text.integer("moe_intermediate_size")
        self.top_k = text.integer("num_experts_per_tok", 8)
        self.scaling = text.number("routed_scaling_factor", 2.5)
        self.renormalise = text.boolean("norm_topk_prob", True)
        self.groups, self.kept_groups = expert_groups(text, count, self.top_k)
        # Scores in bfloat16 would tie, and what ties is chosen by chance.
        exact = replace(place.exact, dtype=torch.float32)
        self.router = Linear(hidden, {"gate": count}, place=exact)
        self.gate = nn.ModuleDict({"e_score_correction_bias": Vector(count, place=exact)})  # its name's other half
        self.experts = Experts(count, hidden, width, "silu", place=place)
        shared = text.integer("n_shared_experts")
        self.shared_experts = GatedMLP(hidden, width * shared, "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        # torch.sigmoid rounds numbers at the end of its input in another way, so the same token might go elsewhere.
        scores = 1 / (1 + (-self.router(x.float())).exp())
        choice = scores + self.gate["e_score_correction_bias"].values
        if self.kept_groups < self.groups:
            two_best = choice.unflatten(-1, (self.groups, -1)).topk(2, dim=-1).values
            choice = self._within(two_best.sum(dim=-1).topk(self.kept_groups, dim=-1).indices, choice)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return self.experts(x, ids, weights * self.scaling) + self.shared_experts(x)

    def _within(self, kept: Tensor, choice: Tensor) -> Tensor:
        """choice [T, E] with those outside the groups kept [T, topk_group] out of the question: a bias may make
        every choice negative, so 0 would not do."""
        is_kept = torch.zeros(len(choice), self.groups, dtype=torch.bool, device=choice.device).scatter_(1, kept, True)
        grouped = choice.unflatten(-1, (self.groups, -1))
        return grouped.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).flatten(1)


def expert_groups(text: Fields, count: int, top_k: int) -> tuple[int, int]:
    """(groups, groups that a token may choose from)."""
    text.refuse("scoring_func", "sigmoid")
    text.refuse("topk_method", "noaux_tc")
    groups, kept = text.integer("n_group", 8), text.integer("topk_group", 4)
    if count % groups or count // groups < 2 or kept > groups or top_k > kept * (count // groups):
        raise BadModelConfig(
            f"{text.where}: {top_k} of {count} experts cannot be chosen with n_group {groups} and topk_group {kept}"
        )
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
    first, step = text.integer("first_k_dense_replace", 3, least=0), text.integer("moe_layer_freq", 1)
    return index >= first and index % step == 0


class DeepseekV3ForCausalLM(Decoder):
    """The whole model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        self.shape = shape = LatentShape.read(text, pairs=text.boolean("rope_interleave", True))
        self.predicting_layers = text.integer("num_nextn_predict_layers", 1, least=0)
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

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        for index in range(len(self.layers), len(self.layers) + self.predicting_layers):
            yield rf"model\.layers\.{index}\..*"

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual
