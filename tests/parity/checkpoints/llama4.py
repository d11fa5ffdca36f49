"""Llama 4 as Scout has it (every layer a mixture, head norms, stretched rotary) and as Maverick has it (neither).

Chunks are shorter than most prompts, and the full layers' queries begin to grow within them.
"""

from __future__ import annotations

from typing import Any

from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape, sizes
from torch import Tensor
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
    PreTrainedModel,
)

_STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
SCOUT_SHAPES = (
    {
        **sizes(307, 48, 40, 4, 2, 16, 4),
        "num_local_experts": 8,
        "attention_chunk_size": 16,
        "rope_parameters": _STRETCHED,
        "floor_scale": 12,
        "attn_scale": 0.3,
        "multimodal": True,
        **TOKENS,
    },
    {
        **sizes(281, 40, 32, 6, 1, 12, 5),
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_chunk_size": 21,
        "no_rope_layers": [1, 0, 1, 1, 0],
        "rope_parameters": {**_STRETCHED, "factor": 8.0, "high_freq_factor": 4.0},
        "floor_scale": 7,
        "attention_bias": True,
        **TOKENS,
    },
    {
        **sizes(331, 56, 24, 8, 8, 8, 3),
        "num_local_experts": 16,
        "attention_chunk_size": 40,
        "no_rope_layer_interval": 2,
        "rope_parameters": _STRETCHED,
        "floor_scale": 30,
        "attn_scale": 0.5,
        "multimodal": True,
        **TOKENS,
    },
)
_MAVERICK = {"use_qk_norm": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
MAVERICK_SHAPES = (
    {
        **sizes(313, 48, 32, 8, 2, 12, 4),
        "intermediate_size_mlp": 72,
        "num_local_experts": 12,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "floor_scale": 10,
        "multimodal": True,
        **_MAVERICK,
        **TOKENS,
    },
    {
        **sizes(293, 32, 24, 5, 1, 16, 6),
        "intermediate_size_mlp": 40,
        "num_local_experts": 7,
        "moe_layers": [0, 3, 4],
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 33,
        "attn_temperature_tuning": False,
        **_MAVERICK,
        **TOKENS,
    },
    {
        **sizes(349, 40, 48, 4, 4, 24, 4),
        "intermediate_size_mlp": 56,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 24,
        "floor_scale": 16,
        "attn_scale": 0.4,
        "multimodal": True,
        **_MAVERICK,
        **TOKENS,
    },
)
#: A tower that nothing here looks through.
_VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vision_output_dim": 8,
    "image_size": 28,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}


def build(shape: Shape) -> PreTrainedModel:
    """`multimodal` wraps the text model as the hub's checkpoints do (prefix language_model.model.)."""
    text = Llama4TextConfig(**{key: value for key, value in shape.items() if key != "multimodal"})
    if not shape.get("multimodal"):
        return Llama4ForCausalLM(text)
    vision = Llama4VisionConfig(**_VISION)
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, image_token_index=270))


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files leave to the reader which layers are which."""
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    text.pop("layer_types")
    text["no_rope_layers"] = shape.get("no_rope_layers", [])
    if "moe_layers" not in shape:
        text.pop("moe_layers")
    config["torch_dtype"] = config.pop("dtype")


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """What the general rules miss: experts are multiplied from the other side, and the wrapper's names are longer."""
    if ".experts." in name:
        return normal(tensor, 1.2 * tensor.shape[1] ** -0.5)
    if name.endswith("router.weight"):
        return normal(tensor, 2 * tensor.shape[1] ** -0.5)
    if name.endswith("lm_head.weight"):
        return normal(tensor, 2 * tensor.shape[1] ** -0.5)
    if name.endswith("model.norm.weight"):
        return (3 + normal(tensor, 0.9)) * normal(tensor, 1.0).sign()
    return None


ARCHITECTURES = {
    "llama4-scout": Architecture(SCOUT_SHAPES, build, 3e-4, hub_config, lively=lively, bfloat16_kl=0.5),
    "llama4-maverick": Architecture(MAVERICK_SHAPES, build, 3e-4, hub_config, lively=lively, bfloat16_kl=0.5),
}
