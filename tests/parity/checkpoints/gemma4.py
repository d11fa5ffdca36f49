"""Gemma 4: four architectures in one family, alone and inside the multimodal wrapper."""

from __future__ import annotations

from typing import Any

import torch
from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape, sizes
from torch import Tensor
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    PreTrainedModel,
)

S, F = "sliding_attention", "full_attention"
_GEMMA = {"final_logit_softcapping": 30.0, **TOKENS}
_E2B = {"attention_k_eq_v": False, **_GEMMA}
_LARGE = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", **_GEMMA}

E2B_SHAPES = (
    {
        **sizes(307, 48, 96, 4, 1, 16, 7),
        "layer_types": [S, S, F, S, S, S, F],
        "global_head_dim": 32,
        "sliding_window": 16,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 24,
        **_E2B,
    },
    {
        **sizes(331, 64, 80, 8, 1, 8, 10),
        "layer_types": [S, S, S, S, F] * 2,
        "global_head_dim": 16,
        "sliding_window": 9,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 20,
        "multimodal": True,
        **_E2B,
    },
    {
        **sizes(289, 40, 72, 2, 1, 24, 5),
        "layer_types": [S, F, S, S, F],
        "global_head_dim": 40,
        "sliding_window": 33,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "multimodal": True,
        **_E2B,
    },
)
E4B_SHAPES = (
    {
        **sizes(311, 56, 112, 4, 2, 16, 12),
        "global_head_dim": 32,
        "sliding_window": 16,
        "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 24,
        "multimodal": True,
        **_E2B,
    },
    {
        **sizes(277, 48, 64, 6, 2, 8, 8),
        "layer_types": [S, S, F, S, S, F, S, F],
        "global_head_dim": 24,
        "sliding_window": 7,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 28,
        **_E2B,
    },
    {
        **sizes(401, 32, 48, 8, 4, 12, 6),
        "layer_types": [S, F, S, F, S, F],
        "global_head_dim": 12,
        "sliding_window": 24,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "tie_word_embeddings": False,
        **_E2B,
    },
)
G31B_SHAPES = (
    {
        **sizes(293, 48, 96, 8, 4, 16, 6),
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 16,
        "multimodal": True,
        **_LARGE,
    },
    {
        **sizes(283, 64, 64, 4, 2, 8, 7),
        "layer_types": [S, S, F, S, S, S, F],
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "sliding_window": 11,
        **_LARGE,
    },
    {
        **sizes(349, 40, 56, 6, 6, 12, 4),
        "layer_types": [F, S, S, F],
        "global_head_dim": 20,
        "num_global_key_value_heads": 3,
        "sliding_window": 32,
        "attention_bias": True,
        **_LARGE,
    },
)
G26B_SHAPES = (
    {
        **sizes(313, 48, 40, 8, 4, 16, 6),
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 16,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "multimodal": True,
        **_LARGE,
    },
    {
        **sizes(271, 32, 48, 4, 2, 12, 4),
        "layer_types": [S, F, S, F],
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": 10,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 3,
        "moe_intermediate_size": 16,
        **_LARGE,
    },
    {
        **sizes(359, 56, 32, 4, 4, 8, 5),
        "layer_types": [S, S, S, S, F],
        "global_head_dim": 24,
        "num_global_key_value_heads": 2,
        "sliding_window": 21,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 12,
        **_LARGE,
    },
)


def build(shape: Shape) -> PreTrainedModel:
    """`multimodal` wraps the text model as the hub's checkpoints do (prefix model.language_model.)."""
    fields = {key: value for key, value in shape.items() if key != "multimodal"}
    text = Gemma4TextConfig(vocab_size_per_layer_input=fields["vocab_size"], **fields)
    if not shape.get("multimodal"):
        return Gemma4ForCausalLM(text)
    media = {"image_token_id": 270, "audio_token_id": 271, "video_token_id": 272}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=None, audio_config=None, **media)
    )


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files say global_* where transformers 5 saves a table of layers."""
    text = config.get("text_config", config)
    if text.pop("per_layer_config", None) is not None:
        text["global_head_dim"] = shape["global_head_dim"]
        text["num_global_key_value_heads"] = shape.get("num_global_key_value_heads")
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The published files hold shared layers' keys and values, media towers and a tied head too."""
    extra: dict[str, Tensor] = {}
    prefix = "model.language_model." if shape.get("multimodal") else "model."
    layers, shared = shape["num_hidden_layers"], shape.get("num_kv_shared_layers", 0)
    for index in range(layers - shared, layers):
        donor = f"{prefix}layers.{index}.self_attn."
        rows = tensors[f"{donor}q_norm.weight"].shape[0] * shape["num_key_value_heads"]
        for part in ("k_proj", "v_proj"):
            extra[f"{donor}{part}.weight"] = torch.full((rows, shape["hidden_size"]), 99.0)
        extra[f"{donor}k_norm.weight"] = torch.full_like(tensors[f"{donor}q_norm.weight"], 99.0)
    if shape.get("multimodal"):
        extra["model.vision_tower.patch_embedder.input_proj.weight"] = torch.zeros(4, 12)
        extra["model.audio_tower.layers.0.norm_out.weight"] = torch.zeros(4)
        extra["model.embed_vision.embedding_projection.weight"] = torch.zeros(4, 4)
        extra["model.embed_audio.embedding_projection.weight"] = torch.zeros(4, 4)
    return tensors | extra


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """Heads' norms of the size that a trained model has, where attention has no scale of its own."""
    if "layers" in name and name.endswith(("q_norm.weight", "k_norm.weight")):
        return tensor.shape[0] ** -0.25 * (1.2 + normal(tensor, 0.3))
    return None


def _architecture(shapes: tuple[Shape, ...], bfloat16_kl: float = 0.05) -> Architecture:
    return Architecture(shapes, build, 3e-4, hub_config, hub_tensors, lively, bfloat16_kl)


ARCHITECTURES = {
    "gemma4-e2b": _architecture(E2B_SHAPES),
    "gemma4-e4b": _architecture(E4B_SHAPES),
    "gemma4-31b": _architecture(G31B_SHAPES),
    "gemma4-26b-a4b": _architecture(G26B_SHAPES, bfloat16_kl=0.5),
}
