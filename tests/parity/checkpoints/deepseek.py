"""DeepSeek V2-Lite, V2 and V3, as their authors publish them: own code, per-expert tensors, a layer of prediction."""

from __future__ import annotations

from typing import Any

import torch
from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)


def _sizes(vocab: int, hidden: int, wide: int, heads: int, layers: int, **others: Any) -> Shape:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        **TOKENS,
        **others,
    }


def _latent(nope: int, rope: int, value: int, rank: int, query_rank: int | None) -> Shape:
    return {
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "kv_lora_rank": rank,
        "q_lora_rank": query_rank,
    }


def _experts(count: int, top_k: int, width: int, shared: int, dense: int, scaling: float, **others: Any) -> Shape:
    return {
        "n_routed_experts": count,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
        "first_k_dense_replace": dense,
        "routed_scaling_factor": scaling,
        **others,
    }


def _yarn(original: int, mscale: float, mscale_all_dim: float) -> Shape:
    """Prompts of the tests reach 128 tokens and more, beyond each of these original lengths."""
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 40.0,
            "original_max_position_embeddings": original,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
        }
    }


_GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
V2_LITE_SHAPES = (
    _sizes(303, 48, 96, 4, 4)
    | _latent(16, 8, 16, 32, None)
    | _experts(8, 3, 24, 2, 1, 1.0, **_GREEDY)
    | _yarn(32, 0.707, 0.707),
    _sizes(275, 64, 80, 8, 3) | _latent(12, 6, 20, 22, None) | _experts(6, 2, 20, 1, 1, 1.5, **_GREEDY),
    _sizes(347, 40, 64, 5, 5, rms_norm_eps=1e-3, attention_bias=True)
    | _latent(18, 10, 9, 70, None)
    | _experts(16, 6, 12, 2, 0, 1.0, **_GREEDY)
    | _yarn(48, 1.0, 0.707),
)


def _limited(groups: int, kept: int) -> Shape:
    return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": kept, "norm_topk_prob": False}


V2_SHAPES = (
    _sizes(309, 48, 64, 4, 4)
    | _latent(16, 8, 16, 32, 24)
    | _experts(16, 4, 24, 2, 1, 3.0, **_limited(8, 3))
    | _yarn(32, 1.0, 1.0),
    _sizes(281, 32, 48, 8, 3, tie_word_embeddings=True, attention_bias=True)
    | _latent(10, 12, 6, 18, 40)
    | _experts(12, 3, 16, 1, 2, 1.0, **_limited(4, 2)),
    _sizes(337, 56, 40, 7, 3, rms_norm_eps=1e-5)
    | _latent(24, 4, 32, 48, 16)
    | _experts(12, 4, 16, 2, 1, 2.0, **_limited(3, 1))
    | _yarn(24, 0.707, 1.0),
)


def _balanced(groups: int, kept: int, renormalise: bool = True) -> Shape:
    return {"n_group": groups, "topk_group": kept, "norm_topk_prob": renormalise}


V3_SHAPES = (
    _sizes(313, 48, 64, 4, 5)
    | _latent(16, 8, 16, 32, 24)
    | _experts(16, 4, 24, 1, 3, 2.5, **_balanced(4, 2))
    | _yarn(32, 1.0, 1.0),
    _sizes(271, 40, 48, 5, 3, rms_norm_eps=1e-3, attention_bias=True, rope_interleave=False)
    | _latent(9, 14, 11, 27, 18)
    | _experts(12, 3, 16, 2, 1, 1.7, **_balanced(3, 2, renormalise=False)),
    _sizes(359, 64, 56, 8, 4, num_nextn_predict_layers=2)
    | _latent(12, 6, 24, 40, None)
    | _experts(8, 4, 24, 1, 1, 2.5, **_balanced(1, 1))
    | _yarn(40, 0.8, 1.0),
    _sizes(293, 32, 40, 2, 3) | _latent(20, 4, 8, 16, 12) | _experts(32, 8, 8, 1, 0, 2.5, **_balanced(8, 4)),
)


def build_v2(shape: Shape) -> PreTrainedModel:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**shape))


def build_v3(shape: Shape) -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**shape))


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """Biases that decide between experts, most of them so negative that a group set to 0 would win over all others."""
    if name.endswith("e_score_correction_bias"):
        return normal(tensor, 0.3) - 1.0
    if name.endswith("mlp.gate.weight"):
        return normal(tensor, 2 * tensor.shape[-1] ** -0.5)
    if name.endswith("_a_layernorm.weight"):
        # Scores of a few units after the factor of a stretched rotary: sharper ones would amplify rounding.
        return 0.6 + normal(tensor, 0.15)
    return None


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files have older names, what only training needs, and the class that their own code holds."""
    (architecture,), version = config["architectures"], config["model_type"][-2:]
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = rope | {"type": kind} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config["auto_map"] = {
        "AutoConfig": f"configuration_deepseek.Deepseek{version.upper()}Config",
        "AutoModelForCausalLM": f"modeling_deepseek.{architecture}",
    }
    config |= {"ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1}
    config["scoring_func"] = "softmax" if version == "v2" else "sigmoid"
    if version == "v3":
        config["topk_method"] = "noaux_tc"
    for name in ("head_dim", "qk_head_dim", "num_mtp_layers", "num_local_experts", "num_experts", "mlp_bias"):
        config.pop(name, None)
    if version == "v3":
        config["num_nextn_predict_layers"] = shape.get("num_nextn_predict_layers", 1)


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Beside the model: frequencies that older code stored, and V3's layers that predict further tokens."""
    held = dict(tensors)
    count, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    junk = torch.full((shape["qk_rope_head_dim"] // 2,), 99.0)
    held |= {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": junk.clone() for index in range(count)}
    if not any(name.endswith("e_score_correction_bias") for name in tensors):
        return held
    for layer in range(count, count + shape.get("num_nextn_predict_layers", 1)):
        last = f"model.layers.{count - 1}."
        held |= {
            f"model.layers.{layer}.{name.removeprefix(last)}": torch.full_like(tensor, 99.0)
            for name, tensor in tensors.items()
            if name.startswith(last)
        }
        held |= {
            f"model.layers.{layer}.eh_proj.weight": torch.zeros(hidden, 2 * hidden),
            f"model.layers.{layer}.enorm.weight": torch.ones(hidden),
            f"model.layers.{layer}.hnorm.weight": torch.ones(hidden),
            f"model.layers.{layer}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            f"model.layers.{layer}.shared_head.norm.weight": torch.ones(hidden),
            f"model.layers.{layer}.shared_head.head.weight": tensors["model.embed_tokens.weight"].clone(),
        }
    return held


_HUB = {"hub_config": hub_config, "hub_tensors": hub_tensors, "lively": lively}
ARCHITECTURES = {
    "deepseek-v2-lite": Architecture(V2_LITE_SHAPES, build_v2, 3e-4, **_HUB),
    "deepseek-v2": Architecture(V2_SHAPES, build_v2, 3e-4, **_HUB, bfloat16_kl=0.1),
    "deepseek-v3": Architecture(V3_SHAPES, build_v3, 3e-4, **_HUB, bfloat16_kl=0.3),
}
