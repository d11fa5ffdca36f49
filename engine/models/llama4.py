"""Llama 4, text: chunked layers with rotary and full layers without, single-choice experts that scale their input.

    chunked layer   neighbours in a head rotate together, then q and k are normalised without a weight (Scout); a
                    token sees its own chunk of positions only
    full layer      no rotary; q grows with the logarithm of the position, so that a long context stays sharp
    mixture         shared(x) + expert(sigmoid(score) * x), where score is the expert's, the largest of the router's

T tokens of a step, H hidden, V vocabulary, E experts, K chosen (1 in the published models).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape
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
from inferfleet.kernels.rms_norm import rms_norm
from inferfleet.kernels.rotary import apply_rotary_pairs

CHUNKED, FULL = "chunked_attention", "full_attention"


@dataclass(frozen=True)
class LayerPlan:
    """What the configuration makes of one layer."""

    index: int
    sight: Sight
    has_rope: bool
    is_sparse: bool


@dataclass(frozen=True)
class Sharpening:
    """How the full layers' queries grow with their position p: 1 + scale * log(1 + floor((p + 1) / step))."""

    step: float
    scale: float

    @classmethod
    def read(cls, text: Fields) -> Sharpening | None:
        """None where attn_temperature_tuning turns it off. The first uploads have the number 4 there for true."""
        tuning = text.values.get("attn_temperature_tuning")
        if tuning is not None and not isinstance(tuning, int):
            raise BadModelConfig(
                f"{text.where}: attn_temperature_tuning must be true, false or an integer, not {tuning!r}"
            )
        if tuning is not None and not tuning:
            return None
        return cls(text.integer("floor_scale", 8192), text.number("attn_scale", 0.1))

    def of(self, positions: Tensor) -> Tensor:
        """positions [T] -> [T, 1, 1] float32."""
        steps = torch.floor((positions.float() + 1) / self.step)
        return (torch.log1p(steps) * self.scale + 1).view(-1, 1, 1)


@dataclass(frozen=True)
class Angles:
    """What depends on the positions of a step: cos and sin [T, d] of rotary, the full layers' factor of q [T, 1, 1]."""

    cos: Tensor
    sin: Tensor
    sharpness: Tensor | None


class Attention(nn.Module):
    """x [T, H] -> [T, H]."""

    def __init__(self, plan: LayerPlan, shape: AttentionShape, normed: bool, *, place: Place) -> None:
        super().__init__()
        self.index, self.has_rope, self.eps = plan.index, plan.has_rope, shape.eps
        self.is_normed = normed and plan.has_rope
        heads, kv_heads = place.group.heads(shape.num_heads, shape.num_kv_heads)
        self.head_dim, self.num_heads, self.num_kv_heads = shape.head_dim, heads.size, kv_heads.size
        q_size, kv_size = heads.times(shape.head_dim), kv_heads.times(shape.head_dim)
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = Linear(shape.hidden, parts, bias=shape.bias, place=place)
        self.output = Linear(q_size, {"o_proj": shape.hidden}, bias=shape.bias, place=place)

    def forward(self, x: Tensor, angles: Angles, batch: Batch) -> Tensor:
        tokens, d = x.shape[0], self.head_dim
        q, k, v = self.qkv(x).split(self.qkv.sizes, dim=1)
        q, k = q.view(tokens, self.num_heads, d), k.view(tokens, self.num_kv_heads, d)
        if self.has_rope:
            q, k = self._turn(q, angles), self._turn(k, angles)
        elif angles.sharpness is not None:
            q = (q.float() * angles.sharpness).to(x.dtype)
        out = batch.attend(self.index, q, k, v.view(tokens, self.num_kv_heads, d), scale=d**-0.5)
        return self.output(out.view(tokens, -1))

    def _turn(self, heads: Tensor, angles: Angles) -> Tensor:
        turned = apply_rotary_pairs(heads, angles.cos, angles.sin)
        return rms_norm(turned, None, self.eps) if self.is_normed else turned


class SparseMLP(nn.Module):
    """x [T, H] -> the shared expert plus each token's chosen ones [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        count, width = text.integer("num_local_experts", 16), text.integer("intermediate_size")
        self.top_k = text.integer("num_experts_per_tok", 1)
        if self.top_k > count:
            raise BadModelConfig(f"{text.where}: num_experts_per_tok is {self.top_k}, more than the {count} experts")
        self.choice = Linear(hidden, {"router": count}, place=place.exact)
        self.experts = Experts(count, hidden, width, "silu", place=place)
        self.shared_expert = GatedMLP(hidden, width, "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        best, ids = self.choice(x).topk(self.top_k, dim=-1)
        scores = best.float().sigmoid().to(x.dtype)
        # The score enters before the activation, so each choice is a row of its own that counts in full.
        rows = (x.unsqueeze(1) * scores.unsqueeze(2)).flatten(0, 1)
        parts = self.experts(rows, ids.view(-1, 1), scores.new_ones(rows.shape[0], 1))
        return self.shared_expert(x) + parts.view(-1, self.top_k, x.shape[1]).sum(1)


class Block(nn.Module):
    """Attention and a dense or sparse MLP, each on the norm of the residual stream."""

    def __init__(self, plan: LayerPlan, text: Fields, shape: AttentionShape, *, place: Place) -> None:
        super().__init__()
        self.self_attn = Attention(plan, shape, text.boolean("use_qk_norm", True), place=place)
        self.feed_forward: nn.Module
        if plan.is_sparse:
            self.feed_forward = SparseMLP(text, shape.hidden, place=place)
        else:
            self.feed_forward = GatedMLP(shape.hidden, text.integer("intermediate_size_mlp"), "silu", place=place)
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)

    def forward(self, branch: Tensor, residual: Tensor | None, angles: Angles, batch: Batch) -> tuple[Tensor, Tensor]:
        """Takes and gives (last branch, residual) apart, because adding them is half of the next norm."""
        if residual is None:
            normed, residual = self.input_layernorm(branch), branch
        else:
            normed, residual = self.input_layernorm.after_add(branch, residual)
        attended = self.self_attn(normed, angles, batch)
        normed, residual = self.post_attention_layernorm.after_add(attended, residual)
        return self.feed_forward(normed), residual


class Llama4ForCausalLM(Decoder):
    """The text model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        default_head_dim = text.integer("hidden_size") // text.integer("num_attention_heads")
        shape = AttentionShape.read(text, default_head_dim=default_head_dim)
        self.shape = shape = replace(shape, eps=text.number("rms_norm_eps", 1e-5))
        self.num_kv_heads = place.group.kv_heads(shape.num_kv_heads)
        self.plans = layer_plans(text)
        self.sharpening = Sharpening.read(text)
        vocab = text.integer("vocab_size")
        self.embed_tokens = Embedding(vocab, shape.hidden, place=place)
        self.layers = nn.ModuleList(Block(plan, text, shape, place=place) for plan in self.plans)
        self.norm = RMSNorm(shape.hidden, shape.eps, "llama", place=place)
        tied = self.embed_tokens if text.boolean("tie_word_embeddings", False) else None
        self.lm_head = Head(vocab, shape.hidden, tied=tied, place=place)
        rope = rope_fields(text)
        rope = Fields({"rope_theta": 500_000.0, **rope.values}, rope.where)
        self.rotary = Rotary(rope, shape.head_dim, text.integer("max_position_embeddings"), device=place.device)

    @property
    def cache_spec(self) -> CacheSpec:
        kv_heads, d = self.num_kv_heads, self.shape.head_dim
        return CacheSpec(tuple(KeyValues(kv_heads, d, plan.sight) for plan in self.plans))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        angles = Angles(cos, sin, self.sharpening.of(positions) if self.sharpening else None)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, angles, batch)
        return branch + residual


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """The published checkpoints, of which the language model alone is used: images are refused before they get here."""

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield r"vision_model\..*"
        yield r"multi_modal_projector\..*"

    def _checkpoint_name(self, name: str) -> str:
        return "language_model." + super()._checkpoint_name(name)


def layer_plans(text: Fields) -> tuple[LayerPlan, ...]:
    """The kind of every layer. Despite its name, a 1 in no_rope_layers says that the layer has rotary."""
    count = text.integer("num_hidden_layers")
    interval = text.integer("no_rope_layer_interval", 4)
    ropes = text.list_of(int, "no_rope_layers", [])
    ropes = ropes or [int((index + 1) % interval != 0) for index in range(count)]
    kinds = text.list_of(str, "layer_types", [CHUNKED if rope else FULL for rope in ropes])
    if len(ropes) < count or len(kinds) < count or not set(kinds) <= {CHUNKED, FULL}:
        raise BadModelConfig(
            f"{text.where}: no_rope_layers and layer_types must name {count} layers, the types {CHUNKED} or {FULL}"
        )
    step = text.integer("interleave_moe_layer_step", 1)
    sparse = text.list_of(int, "moe_layers", list(range(step - 1, count, step)))
    sights = {CHUNKED: Sight(chunk=_chunk_size(text)) if CHUNKED in kinds else Sight(), FULL: Sight()}
    return tuple(LayerPlan(index, sights[kinds[index]], bool(ropes[index]), index in sparse) for index in range(count))


def _chunk_size(text: Fields) -> int:
    if text.values.get("attention_chunk_size", 8192) is None:
        raise BadModelConfig(f"{text.where}: attention_chunk_size is null, but there are chunked layers")
    return text.integer("attention_chunk_size", 8192)
