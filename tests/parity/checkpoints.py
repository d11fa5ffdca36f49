"""Tiny random checkpoints in the hub's layout, and the reference that judges them: transformers, run eagerly.

Weights are lively on purpose: norms are not ones, scalars differ, logits reach the softcap, routers decide, so that
a forgotten factor shows. A shape is a dictionary of config fields; each architecture has at least three of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

#: Byte-level characters 0..255 and then the special tokens; model vocabularies are larger, as the real ones are.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>")
PAD, EOS, BOS = 256, 257, 258

S, F = "sliding_attention", "full_attention"
_TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_GEMMA = {"final_logit_softcapping": 30.0, **_TOKENS}
_E2B = {"attention_k_eq_v": False, **_GEMMA}
_LARGE = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", **_GEMMA}


@dataclass(frozen=True)
class Architecture:
    """One of the six architectures: its shapes and how much its logits may differ from the reference."""

    name: str
    shapes: tuple[dict[str, Any], ...]
    build: Callable[[dict[str, Any]], PreTrainedModel]
    tolerance: float


def _gemma(shape: dict[str, Any]) -> PreTrainedModel:
    """`multimodal` wraps the text model as the hub's checkpoints do (prefix model.language_model.)."""
    fields = {key: value for key, value in shape.items() if key != "multimodal"}
    text = Gemma4TextConfig(vocab_size_per_layer_input=fields["vocab_size"], **fields)
    if not shape.get("multimodal"):
        return Gemma4ForCausalLM(text)
    media = {"image_token_id": 270, "audio_token_id": 271, "video_token_id": 272}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=None, audio_config=None, **media)
    )


def _qwen3(shape: dict[str, Any]) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def _qwen3_moe(shape: dict[str, Any]) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))


def _sizes(vocab: int, hidden: int, wide: int, heads: int, kv: int, d: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": d,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
    }


E2B_SHAPES = (
    {
        **_sizes(307, 48, 96, 4, 1, 16, 7),
        "layer_types": [S, S, F, S, S, S, F],
        "global_head_dim": 32,
        "sliding_window": 16,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 24,
        **_E2B,
    },
    {
        **_sizes(331, 64, 80, 8, 1, 8, 10),
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
        **_sizes(289, 40, 72, 2, 1, 24, 5),
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
        **_sizes(311, 56, 112, 4, 2, 16, 12),
        "global_head_dim": 32,
        "sliding_window": 16,
        "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 24,
        "multimodal": True,
        **_E2B,
    },
    {
        **_sizes(277, 48, 64, 6, 2, 8, 8),
        "layer_types": [S, S, F, S, S, F, S, F],
        "global_head_dim": 24,
        "sliding_window": 7,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 28,
        **_E2B,
    },
    {
        **_sizes(401, 32, 48, 8, 4, 12, 6),
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
        **_sizes(293, 48, 96, 8, 4, 16, 6),
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 16,
        "multimodal": True,
        **_LARGE,
    },
    {
        **_sizes(283, 64, 64, 4, 2, 8, 7),
        "layer_types": [S, S, F, S, S, S, F],
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "sliding_window": 11,
        **_LARGE,
    },
    {
        **_sizes(349, 40, 56, 6, 6, 12, 4),
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
        **_sizes(313, 48, 40, 8, 4, 16, 6),
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
        **_sizes(271, 32, 48, 4, 2, 12, 4),
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
        **_sizes(359, 56, 32, 4, 4, 8, 5),
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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
QWEN3_SHAPES = (
    {**_sizes(303, 48, 96, 4, 2, 16, 4), "tie_word_embeddings": True, **_TOKENS},
    {
        **_sizes(275, 64, 80, 8, 1, 12, 3),
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        **_TOKENS,
    },
    {
        **_sizes(347, 40, 64, 6, 3, 24, 5),
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        **_TOKENS,
    },
    {**_sizes(263, 32, 48, 4, 4, 32, 2), "tie_word_embeddings": True, "rope_parameters": _YARN, **_TOKENS},
)
QWEN3_MOE_SHAPES = (
    {
        **_sizes(309, 48, 64, 4, 2, 16, 4),
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        **_TOKENS,
    },
    {
        **_sizes(281, 32, 48, 8, 4, 12, 5),
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        **_TOKENS,
    },
    {
        **_sizes(337, 56, 40, 4, 1, 16, 3),
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 19,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        **_TOKENS,
    },
)

ARCHITECTURES = {
    "gemma4-e2b": Architecture("gemma4-e2b", E2B_SHAPES, _gemma, 5e-4),
    "gemma4-e4b": Architecture("gemma4-e4b", E4B_SHAPES, _gemma, 5e-4),
    "gemma4-31b": Architecture("gemma4-31b", G31B_SHAPES, _gemma, 5e-4),
    "gemma4-26b-a4b": Architecture("gemma4-26b-a4b", G26B_SHAPES, _gemma, 5e-4),
    "qwen3": Architecture("qwen3", QWEN3_SHAPES, _qwen3, 2e-4),
    "qwen3-moe": Architecture("qwen3-moe", QWEN3_MOE_SHAPES, _qwen3_moe, 2e-4),
}


@dataclass
class Reference:
    """transformers' own model of a checkpoint."""

    model: PreTrainedModel
    tolerance: float
    vocab_size: int
    folder: Path
    _memory: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def logits(self, ids: list[int]) -> Tensor:
        """[T, V] float32 for one prompt, mask passed: without it transformers would mask every pad id."""
        key = tuple(ids)
        if key not in self._memory:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                self._memory[key] = self.model(tokens, attention_mask=torch.ones_like(tokens)).logits[0].float()
        return self._memory[key]

    def in_dtype(self, dtype: torch.dtype) -> Reference:
        """The same checkpoint as transformers loads it from the folder in another dtype."""
        model = type(self.model).from_pretrained(self.folder, dtype=dtype, attn_implementation="eager")
        return Reference(model.eval(), self.tolerance, self.vocab_size, self.folder)

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after a prompt, and how far each was ahead of the second best."""
        sequence, margins = list(ids), []
        with torch.no_grad():
            fed, cache = torch.tensor([sequence]), None
            for _ in range(count):
                mask = torch.ones(1, len(sequence), dtype=torch.long)
                out = self.model(fed, attention_mask=mask, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].float().topk(2)
                sequence.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                fed, cache = torch.tensor([sequence[-1:]]), out.past_key_values
        return sequence[len(ids) :], margins


def write(
    name: str, seed: int, folder: Path, *, layout: str = "hub", dtype: torch.dtype = torch.float32, shards: int = 1
) -> Reference:
    """Writes a random checkpoint of architecture `name` to `folder` and returns its judge.

    Seed i takes shape i modulo the number of shapes. layout "saved": as transformers 5 writes it; "hub": as the model's
    authors publish it (older config keys, tensors the model does not use); "stacked": experts of a layer as one tensor.
    """
    logging.disable_progress_bar()
    architecture = ARCHITECTURES[name]
    shape = architecture.shapes[seed % len(architecture.shapes)]
    model = architecture.build(shape)
    model.config._attn_implementation = "eager"
    enliven(model, seed)
    round_to(model, dtype)
    model.save_pretrained(folder)
    _rewrite_config(folder, layout, shape, dtype)
    _rewrite_weights(folder, layout, shape, dtype, shards)
    write_tokenizer(folder)
    model.set_attn_implementation("eager")
    return Reference(model.eval(), architecture.tolerance, shape["vocab_size"], folder)


def enliven(model: PreTrainedModel, seed: int) -> None:
    """Random weights under which every factor of the model matters and logits spread over several units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("layer_scalar")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(("layer_scalar", "per_expert_scale")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif re.fullmatch(r"model\.(language_model\.)?norm\.weight", name):
                # Random signs: else a tied head prefers the very token that was put in, and greedy text repeats it.
                tensor.copy_((3 + normal(tensor, 0.9)) * torch.randn(tensor.shape, generator=generator).sign())
            elif "model.layers" in name.replace("language_", "") and name.endswith(("q_norm.weight", "k_norm.weight")):
                # Sizes that a trained model has: scores of a few units. Sharper ones would amplify rounding.
                scale = tensor.shape[0] ** -0.25 if model.config.model_type.startswith("gemma") else 1.0
                tensor.copy_(scale * (1.2 + normal(tensor, 0.3)))
            elif name.endswith(("norm.weight", "layernorm.weight", "router.scale")) or "layernorm_" in name:
                tensor.copy_(1 + normal(tensor, 0.3))
            elif name.endswith(".bias"):
                tensor.copy_(normal(tensor, 0.5))
            elif "embed_tokens" in name or name.startswith("lm_head"):
                tensor.copy_(normal(tensor, 2 * model.config.get_text_config().hidden_size ** -0.5))
            else:
                gain = 2.0 if name.endswith(("router.proj.weight", "mlp.gate.weight")) else 1.2
                tensor.copy_(normal(tensor, gain * tensor.shape[-1] ** -0.5))


def round_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Leaves the model in float32 with weights that `dtype` can hold. (`model.to` would round the rotary table too.)"""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensor.to(dtype).float())
            assert tensor.dtype == torch.float32, name


def _rewrite_config(folder: Path, layout: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if layout == "hub":
        _rewrite_to_hub_keys(config, shape)
        generation = {"eos_token_id": [EOS, 260], "bos_token_id": BOS, "pad_token_id": PAD, "temperature": 0.6}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    path.write_text(json.dumps(config, indent=2))


def _rewrite_to_hub_keys(config: dict[str, Any], shape: dict[str, Any]) -> None:
    """To the keys of the published files, which are older than what transformers 5 saves."""
    text = config.get("text_config", config)
    if text.pop("per_layer_config", None) is not None:
        text["global_head_dim"] = shape["global_head_dim"]
        text["num_global_key_value_heads"] = shape.get("num_global_key_value_heads")
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    if config["model_type"].startswith("qwen3"):
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
        config["torch_dtype"] = config.pop("dtype")


def _rewrite_weights(folder: Path, layout: str, shape: dict[str, Any], dtype: torch.dtype, shards: int) -> None:
    single = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(single).items()}
    if layout == "hub":
        tensors |= _unused_tensors(tensors, shape)
    if layout == "stacked":
        tensors = _stack_experts(tensors)
    if shards == 1:
        save_file(tensors, single, metadata={"format": "pt"})
        return
    single.unlink()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _unused_tensors(tensors: dict[str, Tensor], shape: dict[str, Any]) -> dict[str, Tensor]:
    """What the hub's files hold beyond the text model: shared layers' keys and values, media towers, a tied head."""
    extra: dict[str, Tensor] = {}
    prefix = "model.language_model." if shape.get("multimodal") else "model."
    for index in _sharing_layers(shape):
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
    if shape.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
        extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return extra


def _sharing_layers(shape: dict[str, Any]) -> range:
    return range(shape["num_hidden_layers"] - shape.get("num_kv_shared_layers", 0), shape["num_hidden_layers"])


def _stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`experts.N.gate_proj.weight` and the like of each layer as `experts.gate_up_proj` and `experts.down_proj`."""
    one = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    kept = {name: tensor for name, tensor in tensors.items() if not one.fullmatch(name)}
    places = {m[1] for name in tensors if (m := one.fullmatch(name))}
    for place in places:
        numbers = sorted({int(m[2]) for name in tensors if (m := one.fullmatch(name)) and m[1] == place})
        parts = {
            k: torch.stack([tensors[f"{place}.{n}.{k}_proj.weight"] for n in numbers]) for k in ("gate", "up", "down")
        }
        kept[f"{place}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        kept[f"{place}.down_proj"] = parts["down"]
    return kept


@functools.cache
def _tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with five special tokens."""
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    template = "{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}<|turn>model\n"
    (folder / "chat_template.jinja").write_text(template)
