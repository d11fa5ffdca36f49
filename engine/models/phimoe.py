"""Phi-3.5-MoE: pre-norm blocks with LayerNorm, biases everywhere, two of E experts chosen by SparseMixer, LongRoPE.

    SparseMixer, for router scores s of a token:
        first:   the best expert; weight = softmax over those within 2 * jitter of it, at the best
        second:  the best of the others, likewise among the others
        "within": (best - s) / max(|s|, best) <= 2 * jitter; for the second choice too over the unmasked |s|
    The two weights are not normalised together: usually both are 1.

T tokens of a step, H hidden, V vocabulary, E experts, h query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.border import Border
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.long_rotary import LongRotary
from inferfleet.engine.layers.norm import LayerNorm
from inferfleet.engine.layers.rotary import Rotary, rope_fields
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight
from inferfleet.kernels.rotary import apply_rotary


class NumberedExperts(Experts):
    """Experts whose three matrices are published as w1 (gate), w3 (up) and w2 (down)."""

    parts = ("w1", "w3", "w2")


class SparseMixture(nn.Module):
    """x [T, H] -> the weighted sum of each token's two chosen experts [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        text.refuse("num_experts_per_tok", 2)  # SparseMixer makes two choices, whatever is asked for
        count = text.integer("num_local_experts", 16, least=2)
        self.jitter = text.number("router_jitter_noise", 0.01)
        self.router = Linear(hidden, {"gate": count}, place=place.exact)
        self.experts = NumberedExperts(count, hidden, text.integer("intermediate_size"), "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = sparse_mixer(self.router(x), self.jitter)
        return self.experts(x, ids, weights)


def sparse_mixer(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """scores [T, E] -> (ids [T, 2], weights [T, 2] in the scores' dtype)."""
    first, first_weight = _best(scores, scores, jitter)
    second, second_weight = _best(scores.scatter(1, first, float("-inf")), scores, jitter)
    return torch.cat((first, second), dim=1), torch.cat((first_weight, second_weight), dim=1)


def _best(candidates: Tensor, scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The best candidate of each token and its share among those near it, both [T, 1]."""
    best, index = candidates.max(dim=1, keepdim=True)
    far = (best - scores) / scores.abs().clamp(min=best) > 2 * jitter
    return index, candidates.masked_fill(far, float("-inf")).softmax(dim=1).gather(1, index)


class Attention(nn.Module):
    """x [T, H] -> [T, H]: biased projections, rotary, attention over the row's context, biased output projection."""

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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        q, k, v = self.qkv(x).split(self.qkv.sizes, dim=1)
        q = apply_rotary(q.view(tokens, self.num_heads, d), cos, sin)
        k = apply_rotary(k.view(tokens, self.num_kv_heads, d), cos, sin)
        out = batch.attend(self.index, q, k, v.view(tokens, self.num_kv_heads, d), scale=d**-0.5)
        return self.output(out.view(tokens, -1))


class Block(nn.Module):
    """Attention and a mixture, each on the norm of the residual stream."""

    def __init__(self, text: Fields, shape: AttentionShape, index: int, *, place: Place) -> None:
        super().__init__()
        self.self_attn = Attention(shape, index, place=place)
        self.block_sparse_moe = SparseMixture(text, shape.hidden, place=place)
        self.input_layernorm = LayerNorm(shape.hidden, shape.eps, place=place)
        self.post_attention_layernorm = LayerNorm(shape.hidden, shape.eps, place=place)

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
        return self.block_sparse_moe(normed), residual


class PhiMoEForCausalLM(Decoder):
    """The whole model; its protocol is families.Model."""

    can_split = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        default_head_dim = text.integer("hidden_size") // text.integer("num_attention_heads")
        shape = AttentionShape.read(text, default_head_dim=default_head_dim)
        self.shape = shape = replace(shape, eps=text.number("rms_norm_eps", 1e-5))  # a LayerNorm's, under an old name
        self.num_kv_heads = place.group.kv_heads(shape.num_kv_heads)
        self.window = _window(text)
        vocab, count = text.integer("vocab_size"), text.integer("num_hidden_layers")
        self.embed_tokens = Embedding(vocab, shape.hidden, place=place)
        self.layers = nn.ModuleList(Block(text, shape, index, place=place) for index in range(count))
        self.norm = LayerNorm(shape.hidden, shape.eps, place=place)
        self.lm_head = _head(text, self.embed_tokens, shape.hidden, place)
        self.rotary = _rotary(text, shape.head_dim, place.device)

    @property
    def border(self) -> Border | None:
        """Where LongRoPE changes from its short to its long factors, as the published code does: by total length."""
        return self.rotary.border if isinstance(self.rotary, LongRotary) else None

    @property
    def cache_spec(self) -> CacheSpec:
        layer = KeyValues(self.num_kv_heads, self.shape.head_dim, Sight(window=self.window))
        return CacheSpec((layer,) * len(self.layers))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions, batch) if self.border else self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual


class PhimoeForCausalLM(PhiMoEForCausalLM):
    """The same model under the name that transformers saves it by."""


def _window(text: Fields) -> int | None:
    """Keys that a token sees, in every layer; None where a window as long as the context hides nothing."""
    longest = text.integer("max_position_embeddings")
    window = text.integer("sliding_window", longest)
    return window if window < longest else None


def _head(text: Fields, embedding: Embedding, hidden: int, place: Place) -> Head:
    tied = text.boolean("tie_word_embeddings", False)
    if tied:
        text.refuse("lm_head_bias", False)
    bias = text.boolean("lm_head_bias", False)
    return Head(text.integer("vocab_size"), hidden, tied=embedding if tied else None, bias=bias, place=place)


def _rotary(text: Fields, head_dim: int, device: torch.device) -> LongRotary | Rotary:
    """LongRoPE, or plain rotary where no scaling is configured."""
    found = rope_fields(text)
    outer = {"original_max_position_embeddings": text.values.get("original_max_position_embeddings")}
    rope = Fields({"rope_theta": 1_000_000.0, **outer, **found.values}, found.where)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return Rotary(rope, head_dim, text.integer("max_position_embeddings"), device=device)
    if kind != "longrope":
        raise UnsupportedModel(f"{rope.where}: rope_type is {kind!r}; this family has only default and longrope")
    return LongRotary(rope, head_dim, device=device)
