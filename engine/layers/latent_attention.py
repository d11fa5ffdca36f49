"""Multi-head latent attention, as DeepSeek's models have it: a token keeps one short vector for all its heads.

    c, k_pe = kv_a_proj_with_mqa(x)       c normalised, k_pe turned to its position: together the token's latent
    k[h]    = [W_k[h] c | k_pe]           v[h] = W_v[h] c        with W_k, W_v the rows of kv_b_proj
    q[h]    = [q_nope[h] | q_pe[h]]       so  q.k = (W_k[h]^T q_nope[h]).c + q_pe[h].k_pe

Keys and values are never made: W_k moves into the query and W_v behind the attention, once at load. So prompts, their
continuations after a prefix hit and decoding are one computation over the latents.

T tokens of a step, H hidden, h heads, R rank of the latent's first part, P numbers of its rotary part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import Latent
from inferfleet.engine.config import Fields
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.rotary import rope_fields
from inferfleet.engine.layers.slots import Slots, Storage, Weighted
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.place import Place
from inferfleet.engine.share import Share
from inferfleet.kernels.head_linear import PackedHeads
from inferfleet.kernels.rotary import apply_rotary, apply_rotary_pairs

#: The two norms inside do not follow rms_norm_eps.
LORA_EPS = 1e-6


@dataclass(frozen=True)
class LatentShape:
    """Sizes of one latent attention layer; a query or key head is `nope` unturned numbers and then `rope` turned."""

    hidden: int
    num_heads: int
    nope: int
    rope: int
    value: int
    rank: int
    #: Rank of the query's own compression; None = one plain q_proj.
    query_rank: int | None
    bias: bool
    #: The rotary part turns neighbours (2i, 2i + 1) together, or else i and i + P/2.
    pairs: bool
    #: Factor of the scores.
    scale: float

    @classmethod
    def read(cls, text: Fields, *, pairs: bool) -> LatentShape:
        heads = text.integer("num_attention_heads")
        text.refuse("num_key_value_heads", heads)
        nope, rope = text.integer("qk_nope_head_dim"), text.integer("qk_rope_head_dim")
        if rope % 2:
            raise BadModelConfig(f"{text.where}: qk_rope_head_dim must be even, not {rope}")
        return cls(
            hidden=text.integer("hidden_size"),
            num_heads=heads,
            nope=nope,
            rope=rope,
            value=text.integer("v_head_dim"),
            rank=text.integer("kv_lora_rank"),
            query_rank=text.integer("q_lora_rank") if "q_lora_rank" in text else None,
            bias=text.boolean("attention_bias", False),
            pairs=pairs,
            scale=(nope + rope) ** -0.5 * score_factor(rope_fields(text)),
        )

    @property
    def cache(self) -> Latent:
        """What a layer of this shape keeps of a token."""
        return Latent(self.rank, self.rope)


def score_factor(rope: Fields) -> float:
    """What a stretched rotary embedding multiplies the scores by: m^2 with m = 0.1 mscale_all_dim ln(factor) + 1."""
    weight = rope.number("mscale_all_dim", 0.0)
    if rope.text("rope_type", rope.text("type", "default")) == "default" or not weight:
        return 1.0
    factor = rope.number("factor")
    return 1.0 if factor <= 1 else (0.1 * weight * math.log(factor) + 1.0) ** 2


class HeadMaps(Weighted):
    """kv_b_proj [h * (nope + value), R], kept as a map into the latent's space for each head and one out of it."""

    def __init__(self, shape: LatentShape, heads: Share, *, place: Place) -> None:
        super().__init__()
        self.shape, self._num_heads = shape, heads.size
        self._weight = Storage(heads.times(shape.nope + shape.value), shape.rank, place=place)
        self._into: PackedHeads | None = None
        self._out_of: PackedHeads | None = None

    def slots(self, name: str) -> Slots:
        return Slots({f"{name}.weight": self._weight.slot()})

    def finalize(self) -> None:
        shape = self.shape
        of_heads = self._weight.take().view(self._num_heads, shape.nope + shape.value, shape.rank)
        keys, values = of_heads.split([shape.nope, shape.value], dim=1)
        self._into, self._out_of = PackedHeads(keys.transpose(1, 2).contiguous()), PackedHeads(values.contiguous())

    def into_latent(self, q: Tensor) -> Tensor:
        """The unturned part of queries [T, h, nope] -> [T, h, R], to be met by latents instead of keys."""
        assert self._into is not None, "finalize comes before the first product"
        return self._into(q)

    def out_of_latent(self, attended: Tensor) -> Tensor:
        """Weighted sums of latents [T, h, R] -> weighted sums of values [T, h, value]."""
        assert self._out_of is not None, "finalize comes before the first product"
        return self._out_of(attended)


class LatentAttention(nn.Module):
    """x [T, H] -> [T, H]: compression, norms, rotary, attention over the row's latents, output projection.

    In a split model each rank has some of the heads, and all have every latent.
    """

    def __init__(self, shape: LatentShape, index: int, *, place: Place) -> None:
        """index: this layer's place in the model's CacheSpec."""
        super().__init__()
        heads = place.group.share(shape.num_heads, "num_attention_heads")
        self.index, self.shape, self.num_heads = index, shape, heads.size
        latent, queries = shape.rank + shape.rope, heads.times(shape.nope + shape.rope)
        if shape.query_rank is None:
            self.query = Linear(shape.hidden, {"q_proj": queries}, place=place)
            self.compress = Linear(shape.hidden, {"kv_a_proj_with_mqa": latent}, bias=shape.bias, place=place)
        else:
            parts = {"q_a_proj": shape.query_rank, "kv_a_proj_with_mqa": latent}
            self.compress = Linear(shape.hidden, parts, bias=shape.bias, place=place)
            self.q_a_layernorm = RMSNorm(shape.query_rank, LORA_EPS, "llama", place=place)
            self.query = Linear(shape.query_rank, {"q_b_proj": queries}, place=place)
        self.kv_a_layernorm = RMSNorm(shape.rank, LORA_EPS, "llama", place=place)
        self.kv_b_proj = HeadMaps(shape, heads, place=place)
        self.output = Linear(heads.times(shape.value), {"o_proj": shape.hidden}, bias=shape.bias, place=place)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        shape, tokens = self.shape, x.shape[0]
        q, compressed = self._project(x)
        q_nope, q_pe = q.view(tokens, self.num_heads, -1).split([shape.nope, shape.rope], dim=2)
        c, k_pe = compressed.split([shape.rank, shape.rope], dim=1)
        turn = apply_rotary_pairs if shape.pairs else apply_rotary
        latent = torch.cat((self.kv_a_layernorm(c), turn(k_pe.unsqueeze(1), cos, sin).squeeze(1)), dim=1)
        absorbed = torch.cat((self.kv_b_proj.into_latent(q_nope), turn(q_pe, cos, sin)), dim=2)
        attended = batch.attend_latent(self.index, absorbed, latent, scale=shape.scale)
        return self.output(self.kv_b_proj.out_of_latent(attended).view(tokens, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> queries [T, h * (nope + P)] and the raw latents [T, R + P]."""
        if self.shape.query_rank is None:
            return self.query(x), self.compress(x)
        low, compressed = self.compress(x).split(self.compress.sizes, dim=1)
        return self.query(self.q_a_layernorm(low)), compressed
