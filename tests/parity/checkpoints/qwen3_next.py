"""Qwen3-Next: DeltaNet layers with as many, twice and four times as many value heads as key heads, beside attention."""

from __future__ import annotations

from typing import Any

import torch
from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape, sizes
from torch import Tensor
from transformers import PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

L, F = "linear_attention", "full_attention"


def _delta(key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int) -> dict[str, Any]:
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": taps,
    }


def _experts(count: int, chosen: int, width: int, shared: int, renormalise: bool) -> dict[str, Any]:
    return {
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": renormalise,
    }


def _rope(theta: float, part: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part, **more}


#: Few DeltaNet layers, whose keys have sixteen numbers at least: where a query hardly meets the keys, the
#: norm of a head makes ones of what is little more than rounding, and each layer more doubles that. transformers' own
#: two forms (chunked and token by token) differ by more than ours does from either.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
SHAPES = (
    {
        **sizes(301, 48, 64, 4, 2, 16, 4),
        **_delta(2, 4, 16, 24, 4),
        **_experts(8, 2, 24, 40, True),
        "layer_types": [F, L, L, F],
        "rope_parameters": _rope(10_000.0, 0.25),
        **TOKENS,
    },
    {
        **sizes(279, 32, 48, 8, 2, 12, 5),
        **_delta(2, 2, 24, 24, 4),
        **_experts(4, 3, 16, 16, False),
        "rms_norm_eps": 1e-5,
        "mlp_only_layers": [1, 3],
        "rope_parameters": _rope(1_000_000.0, 0.5),
        **TOKENS,
    },
    {
        **sizes(343, 40, 56, 6, 6, 16, 4),
        **_delta(1, 4, 28, 20, 3),
        **_experts(16, 4, 12, 20, True),
        "rms_norm_eps": 1e-5,
        "layer_types": [L, L, F, L],
        "decoder_sparse_step": 2,
        "attention_bias": True,
        "rope_parameters": _rope(10_000.0, 0.5),
        **TOKENS,
    },
    {
        **sizes(265, 56, 40, 4, 1, 32, 3),
        **_delta(3, 6, 16, 32, 2),
        **_experts(5, 1, 20, 32, True),
        "layer_types": [L, F, L],
        "tie_word_embeddings": True,
        "rope_parameters": _rope(10_000.0, 0.25, **_YARN),
        **TOKENS,
    },
)


def build(shape: Shape) -> PreTrainedModel:
    return Qwen3NextForCausalLM(Qwen3NextConfig(**shape))


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """Weights around zero where the norm adds one, and decays from a token to some hundred."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.2 + normal(tensor, 0.3)
    if name == "model.norm.weight":
        return (3 + normal(tensor, 0.9)) * normal(tensor, 1.0).sign() - 1
    if name.endswith("layernorm.weight"):
        return normal(tensor, 0.3)
    if name.endswith("A_log"):
        return normal(tensor, 1.5) - 1
    if name.endswith("dt_bias"):
        return normal(tensor, 1.0) - 1
    return None


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published file has the rotary settings and the dtype under older names, and every n-th layer attends."""
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["partial_rotary_factor"] = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if "layer_types" not in shape:
        del config["layer_types"]
        config["full_attention_interval"] = 4


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The published files hold one layer more, which guesses a token ahead."""
    hidden = shape["hidden_size"]
    guess = {
        "mtp.fc.weight": torch.full((hidden, 2 * hidden), 99.0),
        "mtp.norm.weight": torch.full((hidden,), 99.0),
        "mtp.pre_fc_norm_hidden.weight": torch.full((hidden,), 99.0),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.full((8, hidden), 99.0),
        "mtp.layers.0.self_attn.q_proj.weight": torch.full((8, hidden), 99.0),
    }
    return tensors | guess


ARCHITECTURES = {"qwen3-next": Architecture(SHAPES, build, 1e-3, hub_config, hub_tensors, lively, bfloat16_kl=0.5)}
