"""Qwen3-Next: three layers in four carry a matrix from token to token (Gated DeltaNet), the fourth attends.

    DeltaNet    q, k, v through a causal convolution and silu; g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b);
                the gated delta rule; a norm of each head, times silu(z)
    attention   q, k with a head norm, the first part of a head turned; times sigmoid(gate)
    mixture     softmax over all experts, the K largest; plus a shared expert times sigmoid(its gate)

All norms have a weight around zero, the one behind the delta rule excepted.

T tokens of a step, H hidden, V vocabulary, h heads, kv key/value heads, d head dim, E experts, K chosen;
hk, hv key and value heads of a DeltaNet, dk, dv their widths, C = 2 hk dk + hv dv channels of its convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Recurrent, StatePart
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.layers.attention import AttentionShape
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.mlp import GatedMLP
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.rotary import Rotary, rope_fields
from inferfleet.engine.layers.slots import Slot, Slots, Weighted
from inferfleet.engine.layers.vector import Vector
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim, cut, held, whole
from inferfleet.kernels.causal_conv import causal_conv
from inferfleet.kernels.gated_delta import gated_delta

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class DeltaShape:
    """Sizes of one DeltaNet layer."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    eps: float

    @classmethod
    def read(cls, text: Fields) -> DeltaShape:
        key_heads, value_heads = text.integer("linear_num_key_heads", 16), text.integer("linear_num_value_heads", 32)
        if value_heads % key_heads:
            raise BadModelConfig(
                f"{text.where}: linear_num_value_heads is {value_heads}, not a multiple of the {key_heads} key heads"
            )
        return cls(
            hidden=text.integer("hidden_size"),
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=text.integer("linear_key_head_dim", 128),
            value_dim=text.integer("linear_value_head_dim", 128),
            taps=text.integer("linear_conv_kernel_dim", 4, least=2),
            eps=text.number("rms_norm_eps", 1e-6),
        )

    def held(self, key_heads: int) -> DeltaShape:
        """Of a rank that has so many of the key heads, and the value heads that belong to them."""
        return replace(self, key_heads=key_heads, value_heads=self.value_heads // self.key_heads * key_heads)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers that one token's q, k and v have: the channels of the convolution, in its order."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    @property
    def state(self) -> Recurrent:
        """The last inputs of the convolution, and a matrix for each value head."""
        matrices = (self.value_heads, self.key_dim, self.value_dim)
        return Recurrent((StatePart((self.taps - 1, sum(self.sizes)), None), StatePart(matrices, torch.float32)))


class Taps(Weighted):
    """The weight of a depthwise convolution, [channels, 1, K] in a checkpoint, as [K, C]."""

    def __init__(self, taps: int, channels: Dim, *, place: Place) -> None:
        super().__init__()
        self._channels = channels
        self.weight = place.empty(taps, held(channels))

    def slots(self, name: str) -> Slots:
        dims = (self._channels, 1, self.weight.shape[0])
        put = self.weight.t().unsqueeze(1).copy_
        slot = Slot(lambda tensor: put(cut(tensor, dims)), tuple(map(whole, dims)), num_bytes=self.weight.nbytes)
        return Slots({f"{name}.weight": slot})


class DeltaNet(nn.Module):
    """x [T, H] -> [T, H] through the gated delta rule; what a row carries lies in two parts of its state.

    In a split model each rank has some of the key heads, with their value heads; `shape` is its own.
    """

    def __init__(self, shape: DeltaShape, index: int, *, place: Place) -> None:
        """index: this layer's place in the model's CacheSpec."""
        super().__init__()
        heads = place.group.share(shape.key_heads, "linear_num_key_heads")
        self.index, self.shape = index, shape.held(heads.size)
        each = shape.value_heads // shape.key_heads
        keys, values = heads.times(shape.key_dim), heads.times(each * shape.value_dim)
        rows = heads.times(2 * shape.key_dim + 2 * each * shape.value_dim)
        self.qkvz = Linear(shape.hidden, {"in_proj_qkvz": rows}, place=place)
        self.ba = Linear(shape.hidden, {"in_proj_ba": heads.times(2 * each)}, place=place.exact)
        self.conv1d = Taps(shape.taps, keys.then(keys).then(values), place=place)
        exact = Place(torch.float32, place.device)  # the decay of long memories: exp of exp of these
        self.A_log = Vector(heads.times(each), place=exact)
        self.dt_bias = Vector(heads.times(each), place=exact)
        self.norm = RMSNorm(shape.value_dim, shape.eps, "llama", place=place)
        self.output = Linear(values, {"out_proj": shape.hidden}, place=place)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        tokens, shape = x.shape[0], self.shape
        inputs, matrices = batch.states(self.index)
        mixed, z, b, a = self._project(x)
        mixed = causal_conv(mixed, self.conv1d.weight, inputs, batch.state_slots, batch.query_start)
        q, k, v = mixed.split(shape.sizes, dim=1)
        out = gated_delta(
            q.view(tokens, shape.key_heads, shape.key_dim),
            k.view(tokens, shape.key_heads, shape.key_dim),
            v.view(tokens, shape.value_heads, shape.value_dim),
            -self.A_log.values.exp() * F.softplus(a.float() + self.dt_bias.values),
            b.sigmoid().float(),
            matrices,
            batch.state_slots,
            batch.query_start,
        )
        gated = self.norm(out).float() * F.silu(z.float())
        return self.output(gated.to(x.dtype).view(tokens, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q | k | v [T, C], z [T, hv, dv], b [T, hv], a [T, hv]). The checkpoint groups rows by key head."""
        tokens, shape = x.shape[0], self.shape
        heads, each = shape.key_heads, shape.value_heads // shape.key_heads
        widths = [shape.key_dim, shape.key_dim, each * shape.value_dim, each * shape.value_dim]
        *qkv, z = self.qkvz(x).view(tokens, heads, -1).split(widths, dim=2)
        b, a = self.ba(x).view(tokens, heads, 2 * each).split(each, dim=2)
        mixed = torch.cat([part.reshape(tokens, -1) for part in qkv], dim=1)
        z = z.reshape(tokens, shape.value_heads, shape.value_dim)
        return mixed, z, b.reshape(tokens, -1), a.reshape(tokens, -1)


class GatedAttention(nn.Module):
    """x [T, H] -> [T, H]: grouped-query attention whose result is gated, number by number, before the projection."""

    def __init__(self, shape: AttentionShape, index: int, *, place: Place) -> None:
        """index: this layer's place in the model's CacheSpec."""
        super().__init__()
        heads, kv_heads = place.group.heads(shape.num_heads, shape.num_kv_heads)
        self.index, self.num_heads, self.num_kv_heads, self.head_dim = index, heads.size, kv_heads.size, shape.head_dim
        q_size, kv_size = heads.times(shape.head_dim), kv_heads.times(shape.head_dim)
        parts = {"q_proj": heads.times(2 * shape.head_dim), "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = Linear(shape.hidden, parts, bias=shape.bias, place=place)
        self.output = Linear(q_size, {"o_proj": shape.hidden}, bias=shape.bias, place=place)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps, "zero_centered", place=place)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps, "zero_centered", place=place)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        tokens, heads, kv, d = x.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        q_gate, k, v = self.qkv(x).split(self.qkv.sizes, dim=1)
        q, gate = q_gate.view(tokens, heads, 2 * d).chunk(2, dim=2)
        q = self.q_norm.then_rotary(q, cos, sin)
        k = self.k_norm.then_rotary(k.view(tokens, kv, d), cos, sin)
        out = batch.attend(self.index, q, k, v.view(tokens, kv, d), scale=d**-0.5)
        return self.output((out * gate.sigmoid()).view(tokens, -1))


class SparseMLP(nn.Module):
    """x [T, H] -> the weighted sum of each token's chosen experts and its share of the shared one [T, H]."""

    def __init__(self, text: Fields, hidden: int, *, place: Place) -> None:
        super().__init__()
        count = text.integer("num_experts", 512)
        self.top_k = text.integer("num_experts_per_tok", 10)
        if self.top_k > count:
            raise BadModelConfig(f"{text.where}: num_experts_per_tok is {self.top_k}, more than the {count} experts")
        self.renormalise = text.boolean("norm_topk_prob", True)
        self.router = Linear(hidden, {"gate": count, "shared_expert_gate": 1}, place=place.exact)
        self.experts = Experts(count, hidden, text.integer("moe_intermediate_size", 512), "silu", place=place)
        width = text.integer("shared_expert_intermediate_size", 512)
        self.shared_expert = GatedMLP(hidden, width, "silu", place=place)

    def forward(self, x: Tensor) -> Tensor:
        scores, gate = self.router(x).split(self.router.sizes, dim=1)
        weights, ids = scores.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, ids, weights.to(x.dtype)) + gate.sigmoid() * self.shared_expert(x)


class Block(nn.Module):
    """A DeltaNet or attention, and a mixture or a plain MLP, each on the norm of the residual stream."""

    def __init__(self, text: Fields, kind: str, index: int, *, place: Place) -> None:
        super().__init__()
        hidden, eps = text.integer("hidden_size"), text.number("rms_norm_eps", 1e-6)
        self.self_attn: GatedAttention | None = None
        self.linear_attn: DeltaNet | None = None
        if kind == FULL:
            self.self_attn = GatedAttention(AttentionShape.read(text, default_head_dim=256), index, place=place)
        else:
            self.linear_attn = DeltaNet(DeltaShape.read(text), index, place=place)
        self.mlp: nn.Module
        if is_sparse(text, index):
            self.mlp = SparseMLP(text, hidden, place=place)
        else:
            self.mlp = GatedMLP(hidden, text.integer("intermediate_size"), "silu", place=place)
        self.input_layernorm = RMSNorm(hidden, eps, "zero_centered", place=place)
        self.post_attention_layernorm = RMSNorm(hidden, eps, "zero_centered", place=place)

    def forward(
        self, branch: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives (last branch, residual) apart, because adding them is half of the next norm."""
        if residual is None:
            normed, residual = self.input_layernorm(branch), branch
        else:
            normed, residual = self.input_layernorm.after_add(branch, residual)
        mixed = self._mix(normed, cos, sin, batch)
        normed, residual = self.post_attention_layernorm.after_add(mixed, residual)
        return self.mlp(normed), residual

    def _mix(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        if self.linear_attn is not None:
            return self.linear_attn(x, batch)
        assert self.self_attn is not None, "a block has one of the two"
        return self.self_attn(x, cos, sin, batch)


class Qwen3NextForCausalLM(Decoder):
    """The whole hybrid model; its protocol is families.Model."""

    can_split = True

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__()
        text = text_section(config)
        text.refuse("hidden_act", "silu")
        self.kinds = layer_kinds(text)
        self.attention, delta = AttentionShape.read(text, default_head_dim=256), DeltaShape.read(text)
        self.delta = delta.held(place.group.share(delta.key_heads, "linear_num_key_heads").size)
        self.num_kv_heads = place.group.kv_heads(self.attention.num_kv_heads)
        vocab, hidden = text.integer("vocab_size"), text.integer("hidden_size")
        self.embed_tokens = Embedding(vocab, hidden, place=place)
        self.layers = nn.ModuleList(Block(text, kind, index, place=place) for index, kind in enumerate(self.kinds))
        self.norm = RMSNorm(hidden, self.attention.eps, "zero_centered", place=place)
        tied = self.embed_tokens if text.boolean("tie_word_embeddings", False) else None
        self.lm_head = Head(vocab, hidden, tied=tied, place=place)
        self.rotary = partial_rotary(text, self.attention.head_dim, place)

    @property
    def cache_spec(self) -> CacheSpec:
        attended = KeyValues(self.num_kv_heads, self.attention.head_dim)
        return CacheSpec(tuple(attended if kind == FULL else self.delta.state for kind in self.kinds))

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield r"mtp\..*"  # a layer more, which guesses the token after the next

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm."""
        cos, sin = self.rotary(positions)
        branch, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            branch, residual = layer(branch, residual, cos, sin, batch)
        return branch + residual


def layer_kinds(text: Fields) -> tuple[str, ...]:
    """linear_attention or full_attention for each layer: layer_types, or every full_attention_interval-th is full."""
    count, interval = text.integer("num_hidden_layers"), text.integer("full_attention_interval", 4)
    default = [LINEAR if (index + 1) % interval else FULL for index in range(count)]
    kinds = text.list_of(str, "layer_types", default)
    if len(kinds) != count or not set(kinds) <= {LINEAR, FULL}:
        raise BadModelConfig(f"{text.where}: layer_types must hold {count} x {LINEAR} or {FULL}")
    return tuple(kinds)


def partial_rotary(text: Fields, head_dim: int, place: Place) -> Rotary:
    """Angles for the first partial_rotary_factor of a head, whose frequencies are those of a head of that width."""
    rope = rope_fields(text)
    width = int(head_dim * rope.number("partial_rotary_factor", 0.25))
    if width < 2 or width % 2 or width > head_dim:
        raise BadModelConfig(f"{rope.where}: partial_rotary_factor turns {width} numbers of a head of {head_dim}")
    whole = Fields({**rope.values, "partial_rotary_factor": 1.0}, rope.where)
    return Rotary(whole, width, text.integer("max_position_embeddings"), device=place.device)


def is_sparse(text: Fields, index: int) -> bool:
    """Whether layer `index` has experts: every decoder_sparse_step-th one that mlp_only_layers does not exempt."""
    exempt = text.list_of(int, "mlp_only_layers", [])
    step = text.integer("decoder_sparse_step", 1)
    return index not in exempt and text.integer("num_experts", 512, least=0) > 0 and (index + 1) % step == 0
