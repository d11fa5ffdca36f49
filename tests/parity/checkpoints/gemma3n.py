"""Gemma 3n, alone and inside the multimodal wrapper, whose media towers the reference gets without any weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from parity.checkpoints.architecture import TOKENS, Architecture, Normal, Shape, sizes
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    PreTrainedModel,
)
from transformers.models.gemma3n import modeling_gemma3n

S, F = "sliding_attention", "full_attention"

#: MLPs are wide for their hidden size: of a narrow one's gate, sparsity may leave a trace of one number, which the norm
#: behind the MLP blows up together with its rounding.
SHAPES = (
    {
        **sizes(307, 48, 224, 4, 2, 16, 7),
        "layer_types": [S, S, F, S, S, S, F],
        "sliding_window": 16,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": 290,
        "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.7, 0.0, 0.0],
        "laurel_rank": 12,
        **TOKENS,
    },
    {
        **sizes(284, 64, 288, 8, 1, 8, 10),
        "layer_types": [S, S, S, S, F] * 2,
        "sliding_window": 9,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 20,
        "vocab_size_per_layer_input": 270,
        "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 6,
        "laurel_rank": 8,
        "multimodal": True,
        **TOKENS,
    },
    {
        **sizes(331, 40, 72, 2, 2, 24, 5),
        "layer_types": [S, F, S, S, F],
        "intermediate_size": [72, 64, 80, 56, 72],
        "sliding_window": 33,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "altup_correct_scale": False,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 331,
        "activation_sparsity_pattern": [0.0] * 5,
        "final_logit_softcapping": 20.0,
        "rope_parameters": {
            F: {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0},
            S: {"rope_type": "default", "rope_theta": 5_000.0},
        },
        **TOKENS,
    },
    {
        **sizes(300, 32, 512, 4, 4, 12, 12),
        "sliding_window": 7,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 280,
        "attention_bias": True,
        "laurel_rank": 20,
        "tie_word_embeddings": False,
        **TOKENS,
    },
)
#: The ends of vision's and of audio's tokens in the multimodal shape: 270 to 276 and 277 to 283.
VISION = {"hidden_size": 24, "vocab_offset": 270, "vocab_size": 7}
AUDIO = {"hidden_size": 28, "vocab_offset": 277, "vocab_size": 7}


class _NoTowers:
    """Takes the place of transformers' AutoModel: vision would need timm, and a text reaches neither tower."""

    @staticmethod
    def from_config(config: Any) -> nn.Module:
        return AutoModel.from_config(config) if isinstance(config, Gemma3nTextConfig) else nn.Identity()


@contextmanager
def no_towers() -> Iterator[None]:
    known = modeling_gemma3n.AutoModel
    modeling_gemma3n.AutoModel = _NoTowers
    try:
        yield
    finally:
        modeling_gemma3n.AutoModel = known


def build(shape: Shape) -> PreTrainedModel:
    """`multimodal` wraps the text model as the hub's checkpoints do (prefix model.language_model.)."""
    text = Gemma3nTextConfig(**{key: value for key, value in shape.items() if key != "multimodal"})
    if not shape.get("multimodal"):
        return Gemma3nForCausalLM(text)
    whole = Gemma3nConfig(
        text_config=text, vision_config=Gemma3nVisionConfig(**VISION), audio_config=Gemma3nAudioConfig(**AUDIO)
    )
    with no_towers():
        return Gemma3nForConditionalGeneration(whole)


def hub_config(config: dict[str, Any], shape: Shape) -> None:
    """The published files name the bases of both rotary tables beside each other."""
    text = config.get("text_config", config)
    if "rope_parameters" in shape:
        return
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["rope_local_base_freq"] = rope[F]["rope_theta"], rope[S]["rope_theta"]
    text["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")


def hub_tensors(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The published files hold shared layers' keys and values and the media towers too."""
    extra: dict[str, Tensor] = {}
    prefix = "model.language_model." if shape.get("multimodal") else "model."
    layers, rows = shape["num_hidden_layers"], shape["head_dim"] * shape["num_key_value_heads"]
    for index in range(layers - shape["num_kv_shared_layers"], layers):
        donor = f"{prefix}layers.{index}.self_attn."
        for part in ("k_proj", "v_proj"):
            extra[f"{donor}{part}.weight"] = torch.full((rows, shape["hidden_size"]), 99.0)
        extra[f"{donor}k_norm.weight"] = torch.full((shape["head_dim"],), 99.0)
    if shape.get("multimodal"):
        extra["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.zeros(4, 12)
        extra["model.audio_tower.conformer.0.norm.weight"] = torch.zeros(4)
    return tensors | extra


def lively(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """Heads' norms of the size that a trained model has, and AltUp factors near the ones that it starts from."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return tensor.shape[0] ** -0.25 * (1.2 + normal(tensor, 0.3))
    if name.endswith("correct_output_scale"):
        return 1 + normal(tensor, 0.3)
    if name.endswith("modality_router.weight"):
        # The router sees its input divided by H.
        return normal(tensor, 0.4 * tensor.shape[-1] ** 0.5)
    if name.endswith(("prediction_coefs.weight", "correction_coefs.weight")):
        return normal(tensor, 0.1)
    return None


ARCHITECTURES = {"gemma3n": Architecture(SHAPES, build, 1e-3, hub_config, hub_tensors, lively)}
