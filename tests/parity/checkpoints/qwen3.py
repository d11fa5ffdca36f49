"""Qwen3, dense and mixture."""

from __future__ import annotations

from typing import Any

from parity.checkpoints.architecture import TOKENS, Architecture, Shape, sizes
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
QWEN3_SHAPES = (
    {**sizes(303, 48, 96, 4, 2, 16, 4), "tie_word_embeddings": True, **TOKENS},
    {
        **sizes(275, 64, 80, 8, 1, 12, 3),
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        **TOKENS,
    },
    {
        **sizes(347, 40, 64, 6, 3, 24, 5),
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        **TOKENS,
    },
    {**sizes(263, 32, 48, 4, 4, 32, 2), "tie_word_embeddings": True, "rope_parameters": _YARN, **TOKENS},
)
QWEN3_MOE_SHAPES = (
    {
        **sizes(309, 48, 64, 4, 2, 16, 4),
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        **TOKENS,
    },
    {
        **sizes(281, 32, 48, 8, 4, 12, 5),
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        **TOKENS,
    },
    {
        **sizes(337, 56, 40, 4, 1, 16, 3),
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 19,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        **TOKENS,
    },
)


def build(shape: Shape) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def build_moe(shape: Shape) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files have the rotary settings, the dtype and the number of experts under older names."""
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config.pop("dtype")


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Some uploads of tied models hold the head as well."""
    tied = shape.get("tie_word_embeddings") and "lm_head.weight" not in tensors
    return tensors | ({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if tied else {})


ARCHITECTURES = {
    "qwen3": Architecture(QWEN3_SHAPES, build, 2e-4, hub_config, hub_tensors),
    "qwen3-moe": Architecture(QWEN3_MOE_SHAPES, build_moe, 2e-4, hub_config, hub_tensors, bfloat16_kl=0.5),
}
