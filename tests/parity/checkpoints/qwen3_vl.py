"""Qwen3-VL, dense and mixture: the text model inside a multimodal checkpoint with a vision tower of one block."""

from __future__ import annotations

from typing import Any

from parity.checkpoints.architecture import TOKENS, Architecture, Shape, sizes
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

#: Placeholders, in the order of the configuration: image, video, vision start and end.
MEDIA = (270, 271, 272, 273)


def _mrope(theta: float, *section: int, **others: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), "mrope_interleaved": True}
    return {"rope_parameters": {**rope, **others}}


DENSE_SHAPES = (
    {**sizes(303, 48, 96, 4, 2, 16, 4), **_mrope(5e6, 4, 2, 2), "tied": True},
    {**sizes(281, 64, 80, 8, 1, 12, 3), **_mrope(5e5, 2, 2, 2), "tied": False, "attention_bias": True},
    {
        **sizes(347, 40, 64, 6, 3, 24, 5),
        **_mrope(1e4, 4, 4, 4, rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0),
        "tied": False,
    },
)
MOE_SHAPES = (
    {
        **sizes(309, 48, 64, 4, 2, 16, 4),
        **_mrope(5e6, 4, 2, 2),
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "tied": False,
    },
    # The gate and up matrices of an expert are square together, or its down matrix is square: only the other one's
    # shape tells how the stacks lie.
    {
        **sizes(287, 32, 48, 8, 4, 12, 5),
        **_mrope(1e6, 2, 2, 2),
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "tied": True,
    },
    {
        **sizes(337, 24, 40, 4, 1, 16, 3),
        **_mrope(5e6, 3, 3, 2),
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "tied": False,
    },
)


def _whole(shape: Shape) -> dict[str, Any]:
    text = {**{key: value for key, value in shape.items() if key != "tied"}, **TOKENS}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": shape["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    media = dict(zip(names, MEDIA, strict=True))
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": shape["tied"], **media}


def build(shape: Shape) -> PreTrainedModel:
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_whole(shape)))


def build_moe(shape: Shape) -> PreTrainedModel:
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**_whole(shape)))


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files have the rotary settings and the number of experts under older names, the first still nested.

    A mixture's norm_topk_prob is published too, and read by nobody.
    """
    text = config["text_config"]
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
        text["norm_topk_prob"] = False
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    text["dtype"] = config.pop("dtype")


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A mixture's stacks are published as [E, inputs, outputs]."""
    stacks = (".experts.gate_up_proj", ".experts.down_proj")
    return {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(stacks) else tensor
        for name, tensor in tensors.items()
    }


ARCHITECTURES = {
    "qwen3-vl": Architecture(DENSE_SHAPES, build, 2e-4, hub_config, hub_tensors),
    "qwen3-vl-moe": Architecture(MOE_SHAPES, build_moe, 2e-4, hub_config, hub_tensors, bfloat16_kl=0.5),
}
