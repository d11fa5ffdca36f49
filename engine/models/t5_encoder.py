"""T5's encoder (v1.0 and v1.1): token ids to a hidden state for each.

Pre-norm blocks with RMS norms and no biases. Attention scores are not divided by sqrt(d); a learnt bias by distance,
which the first block owns and all blocks share, is added to them. There is no mask: padding takes part, as FLUX was
trained. Formulas: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1; v1.1's gated
feed-forward: Shazeer 2020, "GLU Variants Improve Transformer".

Shapes: B prompts, L tokens, D hidden size, h heads of d.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferfleet.engine.config import Fields
from inferfleet.engine.model_errors import UnsupportedModel

#: No published encoder is nearly so large; a damaged configuration may claim anything.
MOST = 1 << 20

gelu_tanh = functools.partial(F.gelu, approximate="tanh")
#: feed_forward_proj -> (whether it is gated, its function). "gated-gelu" has always meant the tanh form.
FEED_FORWARDS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "relu": (False, F.relu),
    "gelu": (False, F.gelu),
    "gated-relu": (True, F.relu),
    "gated-gelu": (True, gelu_tanh),
    "gated-silu": (True, F.silu),
}


class T5Encoder(nn.Module):
    """Built on the meta device; its modules carry the checkpoint's names."""

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        """config: of text_encoder_2/config.json. Raises BadModelConfig or UnsupportedModel."""
        super().__init__()
        fields = Fields(config, "text_encoder_2/config.json")
        self.hidden_size = fields.integer("d_model", most=MOST)
        self.vocab_size = fields.integer("vocab_size", most=MOST)
        self.shared = nn.Embedding(self.vocab_size, self.hidden_size, device="meta", dtype=dtype)
        self.encoder = _Encoder(fields, dtype)

    @staticmethod
    def rename(name: str) -> str | None:
        """A checkpoint's name as the module's own; None for a decoder's tensors. The embedding has two names."""
        if name.startswith(("decoder.", "lm_head.")):
            return None
        return "shared.weight" if name == "encoder.embed_tokens.weight" else name

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, part) of the parts whose weights are needed one after another."""
        yield "shared", self.shared
        yield from ((f"encoder.block.{i}", block) for i, block in enumerate(self.encoder.block))
        yield "encoder.final_layer_norm", self.encoder.final_layer_norm

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D]."""
        # Between the blocks numbers are float32: T5's grow beyond what float16 holds.
        x, bias = self.shared(ids).float(), None
        for block in self.encoder.block:
            x, bias = block(x, bias)
        return self.encoder.final_layer_norm(x)


class _Encoder(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        num_layers = fields.integer("num_layers", most=1024)
        self.block = nn.ModuleList(_Block(fields, dtype, number == 0) for number in range(num_layers))
        self.final_layer_norm = _Norm(fields, dtype)


class _Block(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype, is_first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((_AttentionLayer(fields, dtype, is_first), _FeedForwardLayer(fields, dtype)))

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, L, D] float32, bias of the first block [1, h, L, L] -> the same two."""
        attention, feed_forward = self.layer
        x, bias = attention(x, bias)
        return feed_forward(x), bias


class _AttentionLayer(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype, is_first: bool) -> None:
        super().__init__()
        self.SelfAttention, self.layer_norm = _Attention(fields, dtype, is_first), _Norm(fields, dtype)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y, bias = self.SelfAttention(self.layer_norm(x), bias)
        return x + y, bias


class _FeedForwardLayer(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        self.DenseReluDense, self.layer_norm = _FeedForward(fields, dtype), _Norm(fields, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Attention(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype, is_first: bool) -> None:
        super().__init__()
        size, self.num_heads = fields.integer("d_model"), fields.integer("num_heads", most=1024)
        inner = self.num_heads * fields.integer("d_kv", most=MOST)
        self.q, self.k, self.v = (nn.Linear(size, inner, bias=False, device="meta", dtype=dtype) for _ in "qkv")
        self.o = nn.Linear(inner, size, bias=False, device="meta", dtype=dtype)
        if is_first:
            self.num_buckets = fields.integer("relative_attention_num_buckets", 32, least=4, most=MOST)
            # Distances up to a quarter of the buckets have one each; the logarithm goes on from there.
            least = self.num_buckets // 4 + 1
            self.max_distance = fields.integer("relative_attention_max_distance", 128, least=least, most=MOST)
            self.relative_attention_bias = nn.Embedding(self.num_buckets, self.num_heads, device="meta", dtype=dtype)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is None:
            buckets = distance_buckets(x.shape[1], self.num_buckets, self.max_distance).to(x.device)
            bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # [B, h, L, d]
        return self.o(heads.transpose(1, 2).flatten(2)), bias


class _FeedForward(nn.Module):
    """wo(act(wi x)), or gated: wo(act(wi_0 x) * wi_1 x)."""

    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        size, wide = fields.integer("d_model"), fields.integer("d_ff", most=MOST)
        name = fields.text("feed_forward_proj", "relu")
        if name not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise UnsupportedModel(f"{fields.where}: feed_forward_proj {name!r} is not one of {known}")
        self.is_gated, self.activation = FEED_FORWARDS[name]
        if self.is_gated:
            self.wi_0, self.wi_1 = (nn.Linear(size, wide, bias=False, device="meta", dtype=dtype) for _ in range(2))
        else:
            self.wi = nn.Linear(size, wide, bias=False, device="meta", dtype=dtype)
        # Its results leave float16's range in the large models.
        wide_range = torch.float32 if dtype == torch.float16 else dtype
        self.wo = nn.Linear(wide, size, bias=False, device="meta", dtype=wide_range)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.wi_0(x)) * self.wi_1(x) if self.is_gated else self.activation(self.wi(x))
        z: Tensor = self.wo(y.to(self.wo.weight.dtype))
        return z


class _Norm(nn.Module):
    """x / rms(x) * weight: no mean is taken off, nothing is added."""

    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = fields.number("layer_norm_epsilon", 1e-6)
        self.weight = nn.Parameter(torch.empty(fields.integer("d_model"), device="meta", dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] float32 -> the weight's number format."""
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(self.weight.dtype)


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """[L, L]: for query i and key j the number of the bucket that their distance j - i falls into.

    Half of the buckets are for keys behind the query. Of each half the first half holds one distance each, the rest
    grow logarithmically up to max_distance; farther keys share the last one.
    """
    position = torch.arange(length)
    distance = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    near, behind = distance.abs(), (distance > 0).long() * half
    growth = torch.log(near.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return behind + torch.where(near < exact, near, far)
