"""Phi-3.5-MoE. The reference's rotary embedding is mended first: it never takes the long factors."""

from __future__ import annotations

from typing import Any

from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape, sizes
from torch import Tensor, cat
from transformers import PhimoeConfig, PhimoeForCausalLM, PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding


def _long_rope(head_dim: int, original: int) -> dict[str, Any]:
    """Factors that grow with the wave length, as published ones do, and a different scale for each set."""
    pairs = head_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.15 * pair for pair in range(pairs)],
        "long_factor": [1.3 + 2.5 * pair for pair in range(pairs)],
        "short_mscale": 1.1,
        "long_mscale": 1.25,
        "original_max_position_embeddings": original,
    }


#: SparseMixer drops an expert at a threshold: a score within rounding of it (6e-8 was seen) may fall on either side, so
#: a jitter is chosen here by which no prompt of the matrix comes so near.
#: A prompt of the matrix grows by 64 tokens, so there nothing crosses the original length; BORDER is for that.
SHAPES = (
    {
        **sizes(311, 48, 24, 4, 2, 16, 4),
        "num_local_experts": 8,
        "router_jitter_noise": 0.1,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 4096,
        "rope_parameters": _long_rope(16, 2048),
        **TOKENS,
    },
    {
        **sizes(289, 64, 32, 8, 1, 12, 3),
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        **TOKENS,
    },
    {
        **sizes(337, 40, 16, 4, 4, 8, 5),
        "num_local_experts": 16,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "sliding_window": 13,
        "rope_parameters": _long_rope(8, 2048),
        **TOKENS,
    },
)
#: As the first and the last shape, but sequences of more than 40 tokens take the long factors.
BORDER_LENGTH = 40
BORDER_SHAPES = (
    {**SHAPES[0], "rope_parameters": _long_rope(16, BORDER_LENGTH)},
    {**SHAPES[2], "rope_parameters": _long_rope(8, BORDER_LENGTH), "lm_head_bias": True},
)


def build(shape: Shape) -> PreTrainedModel:
    PhimoeRotaryEmbedding.forward = _mended_forward
    return PhimoeForCausalLM(PhimoeConfig(**shape))


def _mended_forward(self: PhimoeRotaryEmbedding, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the model's authors have it: the total length chooses the set. transformers 5.23 drops that length."""
    rope, length = self.config.rope_parameters, int(position_ids.max()) + 1
    if rope["rope_type"] == "default":
        frequencies, scale = self.rope_init_fn(self.config)
    else:
        frequencies, _ = self.rope_init_fn(self.config, seq_len=length)
        scale = rope["long_mscale" if length > rope["original_max_position_embeddings"] else "short_mscale"]
    angles = position_ids[..., None].float() * frequencies
    angles = cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published file names the authors' own class, points to its code, and has older names for rotary and dtype."""
    config["architectures"] = ["PhiMoEForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """Router scores of a few units, some so near to each other that both weigh."""
    return normal(tensor, 2.0 * tensor.shape[-1] ** -0.5) if name.endswith("router.weight") else None


ARCHITECTURES = {"phimoe": Architecture(SHAPES, build, 3e-4, hub_config, lively=lively, bfloat16_kl=0.5)}
BORDER = Architecture(BORDER_SHAPES, build, 3e-4, hub_config, lively=lively)
