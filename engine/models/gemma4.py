"""Gemma 4, text: four norms a block, windowed and full layers with head sizes of their own, and four variations.

    E2B, E4B   per-layer embeddings ("PLE") join every block; the upper layers own no keys and values but read those
               of the last layer of their kind that does; E2B's upper layers have MLPs twice as wide
    31B        full layers make V from the key projection (before its norm) and have few, large kv heads
    26B-A4B    as 31B, and every block adds a mixture of experts to its dense MLP

T tokens of a step, H hidden, h query heads, k key/value heads, d head size, L layers, P width of a per-layer embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.layers.gemma_attention import GemmaAttention
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.mlp import GatedMLP
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.per_layer import PerLayerEmbeddings
from inferfleet.engine.layers.rotary import Rotary
from inferfleet.engine.layers.vector import Vector
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight
from inferfleet.kernels.rms_norm import rms_norm

SLIDING, FULL = "sliding_attention", "full_attention"
#: What turns positions into angles where config.json does not say.
DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True)
class LayerPlan:
    """What sets one layer apart from the others."""

    index: int
    kind: str
    head_dim: int
    num_kv_heads: int
    window: int | None
    #: V is made from the key projection.
    v_from_k: bool
    #: The layer whose keys and values are read: itself, or for a sharing layer the last owner of its kind.
    kv_layer: int
    intermediate: int

    @property
    def owns_kv(self) -> bool:
        return self.kv_layer == self.index


@dataclass(frozen=True)
class Gemma4Config:
    """The fields of config.json that shape the text model."""

    vocab_size: int
    hidden: int
    num_heads: int
    eps: float
    attention_bias: bool
    tied: bool
    softcap: float | None
    layers: tuple[LayerPlan, ...]
    #: 0 = no per-layer embeddings.
    ple_size: int
    ple_vocab_size: int
    #: 0 = no mixture.
    num_experts: int
    top_k: int
    moe_intermediate: int
    max_positions: int
    rope: Mapping[str, Fields]

    @classmethod
    def read(cls, text: Fields) -> Gemma4Config:
        text.refuse("hidden_activation", "gelu_pytorch_tanh")
        text.refuse("use_bidirectional_attention", "vision")  # "vision" is about images; text stays causal
        sparse = text.boolean("enable_moe_block", False)
        ple_size = text.integer("hidden_size_per_layer_input", 256, least=0)
        plans = layer_plans(text)
        ple_vocab_size = text.integer("vocab_size_per_layer_input", 262_144) if ple_size else 0
        if ple_size and ple_vocab_size < text.integer("vocab_size"):
            raise BadModelConfig(f"{text.where}: vocab_size_per_layer_input is smaller than vocab_size")
        experts, top_k = (text.integer("num_experts"), text.integer("top_k_experts")) if sparse else (0, 0)
        if top_k > experts:
            raise BadModelConfig(f"{text.where}: top_k_experts is {top_k}, more than the {experts} experts")
        return cls(
            vocab_size=text.integer("vocab_size"),
            hidden=text.integer("hidden_size"),
            num_heads=text.integer("num_attention_heads"),
            eps=text.number("rms_norm_eps", 1e-6),
            attention_bias=text.boolean("attention_bias", False),
            tied=text.boolean("tie_word_embeddings", True),
            softcap=text.number("final_logit_softcapping") if "final_logit_softcapping" in text else None,
            layers=plans,
            ple_size=ple_size,
            ple_vocab_size=ple_vocab_size,
            num_experts=experts,
            top_k=top_k,
            moe_intermediate=text.integer("moe_intermediate_size") if sparse else 0,
            max_positions=text.integer("max_position_embeddings", 131_072),
            rope={kind: _rope(text, kind) for kind in dict.fromkeys(plan.kind for plan in plans)},
        )


def layer_kinds(text: Fields) -> list[str]:
    """sliding_attention or full_attention per layer: five to one by default, and the last one always full."""
    count = text.integer("num_hidden_layers")
    kinds = text.list_of(str, "layer_types", [SLIDING if (i + 1) % 6 else FULL for i in range(count)])
    if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise BadModelConfig(f"{text.where}: layer_types must hold {count} x {SLIDING} or {FULL}")
    return [*kinds[:-1], FULL]


def layer_plans(text: Fields) -> tuple[LayerPlan, ...]:
    """Every layer's sizes; raises BadModelConfig where they cannot fit together."""
    kinds = layer_kinds(text)
    shared = text.integer("num_kv_shared_layers", 0, least=0)
    if shared >= len(kinds):
        raise BadModelConfig(f"{text.where}: num_kv_shared_layers is {shared}, but there are {len(kinds)} layers")
    first_shared = len(kinds) - shared
    owners = {kind: index for index, kind in enumerate(kinds[:first_shared])}
    if set(kinds) != set(owners):
        raise BadModelConfig(f"{text.where}: a layer that shares keys and values has no owner of its kind below it")
    width = text.integer("intermediate_size")
    shared_width = width * 2 if text.boolean("use_double_wide_mlp", False) else width
    plans = [_plan(text, index, kind, index, width) for index, kind in enumerate(kinds[:first_shared])]
    plans += [
        _plan(text, index, kind, owners[kind], shared_width)
        for index, kind in enumerate(kinds[first_shared:], start=first_shared)
    ]
    if len({(plan.kind, plan.head_dim, plan.num_kv_heads) for plan in plans}) > len(owners):
        raise BadModelConfig(f"{text.where}: the layers of one kind must all have the same heads")
    return tuple(plans)


def _plan(text: Fields, index: int, kind: str, kv_layer: int, intermediate: int) -> LayerPlan:
    v_from_k = kind == FULL and text.boolean("attention_k_eq_v", False)
    own = _overrides(text, index, kind)
    kv_heads = own.integer("num_key_value_heads", text.integer("num_key_value_heads", 4))
    head_dim = own.integer("head_dim", text.integer("head_dim", 256))
    heads = text.integer("num_attention_heads")
    if heads % kv_heads:
        raise BadModelConfig(f"{own.where}: {heads} attention heads do not divide by {kv_heads} key/value heads")
    window = text.integer("sliding_window", 512) if kind == SLIDING else None
    return LayerPlan(index, kind, head_dim, kv_heads, window, v_from_k, kv_layer, intermediate)


def _overrides(text: Fields, index: int, kind: str) -> Fields:
    """A layer's own head sizes: the hub's global_* fields for full layers, or the table that transformers 5 saves."""
    if "per_layer_config" in text:
        return text.section("per_layer_config").section(str(index), {})
    if kind == SLIDING:
        return Fields({}, text.where)
    own: dict[str, Any] = {"head_dim": text.integer("global_head_dim", 512)}
    if text.boolean("attention_k_eq_v", False):
        own["num_key_value_heads"] = text.values.get("num_global_key_value_heads")
    return Fields(own, text.where)


def _rope(text: Fields, kind: str) -> Fields:
    return text.section("rope_parameters", DEFAULT_ROPE).section(kind)


class KeyAttention(GemmaAttention):
    """V is made from the key projection too, before its norm and rotation: K and V differ, and both are stored."""

    projections = ("k_proj",)


def attention(config: Gemma4Config, plan: LayerPlan, cache_index: int, place: Place) -> GemmaAttention:
    """A layer's attention; cache_index: place in the CacheSpec of the layer whose keys and values are read."""
    shape = AttentionShape(
        hidden=config.hidden,
        num_heads=config.num_heads,
        num_kv_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        eps=config.eps,
        bias=config.attention_bias,
    )
    kind = KeyAttention if plan.v_from_k else GemmaAttention
    return kind(shape, cache_index, owns_kv=plan.owns_kv, place=place)


class Router(nn.Module):
    """Which experts a token goes to: it sees the residual stream itself, under a norm and scale of its own."""

    def __init__(self, config: Gemma4Config, *, place: Place) -> None:
        super().__init__()
        self.eps, self.root, self.top_k = config.eps, config.hidden**-0.5, config.top_k
        self.product = Linear(config.hidden, {"proj": config.num_experts}, place=place.exact)
        self.scale = Vector(config.hidden, place=place)
        self.per_expert_scale = Vector(config.num_experts, place=place)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> (ids [T, K], weights [T, K] float32)."""
        scores = self.product(rms_norm(x, None, self.eps, style="gemma") * self.scale.values * self.root)
        weights, ids = scores.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return ids, weights * self.per_expert_scale.values[ids]


class Block(nn.Module):
    """Norm, attention, norm; norm, MLP, norm; a per-layer embedding where there are any; all times a learned scalar."""

    def __init__(self, config: Gemma4Config, plan: LayerPlan, cache_index: int, *, place: Place) -> None:
        super().__init__()
        hidden = config.hidden

        def norm() -> RMSNorm:
            return RMSNorm(hidden, config.eps, "gemma", place=place)

        self.self_attn = attention(config, plan, cache_index, place)
        self.mlp = GatedMLP(hidden, plan.intermediate, "gelu_tanh", place=place)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.layer_scalar = Vector(1, place=place)
        self.router: Router | None = None
        if config.num_experts:
            self.router = Router(config, place=place)
            width = config.moe_intermediate
            self.experts = Experts(config.num_experts, hidden, width, "gelu_tanh", place=place)
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = norm(), norm()
        if config.ple_size:
            self.ple_gate = Linear(hidden, {"per_layer_input_gate": config.ple_size}, place=place)
            self.ple_output = Linear(config.ple_size, {"per_layer_projection": hidden}, place=place)
            self.post_per_layer_input_norm = norm()

    def forward(self, x: Tensor, ple: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, H], ple [T, P] of this layer or None -> [T, H]."""
        attended = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, batch))
        normed, x = self.pre_feedforward_layernorm.after_add(attended, x)
        fed = self.mlp(normed)
        if self.router is not None:
            fed = self._with_experts(fed, x, self.router)
        x = x + self.post_feedforward_layernorm(fed)
        if ple is not None:
            gated = nn.functional.gelu(self.ple_gate(x), approximate="tanh") * ple
            x = x + self.post_per_layer_input_norm(self.ple_output(gated))
        return x * self.layer_scalar.values

    def _with_experts(self, dense: Tensor, x: Tensor, router: Router) -> Tensor:
        """The dense MLP's result and the experts', each under its own norm; both started from the same x."""
        ids, weights = router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), ids, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(sparse)


class Gemma4ForCausalLM(Decoder):
    """The whole text model; its protocol is families.Model."""

    can_split = True
    can_replay = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        self.config = c = Gemma4Config.read(text_section(config))
        self.group = place.group
        owners = [plan.index for plan in c.layers if plan.owns_kv]
        #: The layers from here on read keys and values of those before.
        self.num_owners = len(owners)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden, scale=c.hidden**0.5, place=place)
        self.ple: PerLayerEmbeddings | None = None
        if c.ple_size:
            self.ple = PerLayerEmbeddings(c.hidden, c.ple_size, len(c.layers), c.ple_vocab_size, c.eps, place=place)
        self.layers = nn.ModuleList(Block(c, plan, owners.index(plan.kv_layer), place=place) for plan in c.layers)
        self.norm = RMSNorm(c.hidden, c.eps, "gemma", place=place)
        tied = self.embed_tokens if c.tied else None
        self.lm_head = Head(c.vocab_size, c.hidden, tied=tied, place=place)
        head_dims = {plan.kind: plan.head_dim for plan in c.layers}
        self.rotary = nn.ModuleDict(
            {kind: Rotary(c.rope[kind], dim, c.max_positions, device=place.device) for kind, dim in head_dims.items()}
        )

    @property
    def cache_spec(self) -> CacheSpec:
        owners = (plan for plan in self.config.layers if plan.owns_kv)
        kv_heads = self.group.kv_heads
        return CacheSpec(
            tuple(KeyValues(kv_heads(plan.num_kv_heads), plan.head_dim, Sight(plan.window)) for plan in owners)
        )

    def skipped_tensors(self) -> Iterable[str]:
        """The hub's files hold keys and values of layers that share others'."""
        yield from super().skipped_tensors()
        for plan in self.config.layers:
            if not plan.owns_kv:
                yield rf"{re.escape(self.prefix)}layers\.{plan.index}\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+"

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm; meaningful at batch.logits_index."""
        x = self.embed_tokens(input_ids)
        ple = None if self.ple is None else self.ple(input_ids, x)
        angles = {kind: rotary(positions) for kind, rotary in self.rotary.items()}
        owning, sharing = range(self.num_owners), range(self.num_owners, len(self.layers))
        x = self._run(owning, x, ple, angles, batch)
        # The sharing layers store nothing: only tokens whose logits are wanted need to go through them.
        wanted = batch.wanted() if sharing else batch
        if wanted is batch:
            return self._run(sharing, x, ple, angles, batch)
        if len(index := batch.logits_index):
            angles = {kind: (cos[index], sin[index]) for kind, (cos, sin) in angles.items()}
            x[index] = self._run(sharing, x[index], None if ple is None else ple[index], angles, wanted)
        return x

    def _run(
        self,
        layers: range,
        x: Tensor,
        ple: Tensor | None,
        angles: Mapping[str, tuple[Tensor, Tensor]],
        batch: Batch,
    ) -> Tensor:
        """x [T, H] through some of the layers; ple [T, L, P] or None, angles by kind of layer."""
        for index in layers:
            own = None if ple is None else ple[:, index]
            x = self.layers[index](x, own, *angles[self.config.layers[index].kind], batch)
        return x

    def _checkpoint_name(self, name: str) -> str:
        # The checkpoint keeps the parts of the per-layer embeddings beside the layers, not in a module of their own.
        return super()._checkpoint_name(name.removeprefix("ple."))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] of `forward` -> float32 [N, V]. The final norm is here: only sampled rows need it."""
        logits = super().compute_logits(hidden)
        cap = self.config.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Gemma4ForConditionalGeneration(Gemma4ForCausalLM):
    """The text model inside the multimodal checkpoints of the hub. Media towers stay unloaded."""

    prefix = "model.language_model."

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__(config, place=place)
        whole, text = Fields(config), text_section(config)
        media = [
            whole.integer(f"{kind}_token_id", default, least=0)
            for kind, default in (("image", 258_880), ("audio", 258_881), ("video", 258_884))
        ]
        self.media_ids = torch.tensor(media, device=place.device)
        self.pad_id = text.integer("pad_token_id", 0, least=0)
        if self.pad_id >= self.config.vocab_size:
            raise BadModelConfig(f"{text.where}: pad_token_id {self.pad_id} is outside the vocabulary")

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..+"

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        # A media placeholder without its medium reads as padding, as in the reference.
        readable = input_ids.masked_fill(torch.isin(input_ids, self.media_ids), self.pad_id)
        return super().forward(readable, positions, batch)
