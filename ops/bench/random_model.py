"""Writes random-weight models in the hub layout, for timing only. Needs no transformers.

The rows of special tokens in the (tied) embedding are zero, so their logits are exactly 0 and a greedy pick among
thousands of random logits is never one of them: an answer has the length that was asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 32768
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_SPECIAL = VOCAB - len(SPECIAL)

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": FIRST_SPECIAL,
}


def _dense(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return _QWEN3 | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


MODELS: dict[str, dict[str, Any]] = {
    # 222.3 M parameters: the model that the CPU peers were measured on.
    "qwen3-222m": _dense(12, 1024, 3072, 16, 8, 128),
    # Next to nothing to compute: what a step then costs is the engine, its Python and its sampler.
    "null": _dense(1, 64, 64, 1, 1, 64),
    # 16 experts, 4 chosen.
    "qwen3moe-150m": _dense(12, 512, 1024, 8, 4, 64)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def write_model(name: str, folder: Path) -> Path:
    """Writes MODELS[name] into folder/name and returns that folder; the same name always gets the same numbers."""
    config, target = MODELS[name], folder / name
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    write_tokenizer(target)
    save_file(_weights(config), str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its configuration, for any model with VOCAB tokens."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}))
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer() -> Tokenizer:
    """Byte-level BPE with a full vocabulary and no training: the 256 bytes, then pairs of them in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: FIRST_SPECIAL - len(letters)]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weights[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    weights["model.embed_tokens.weight"][FIRST_SPECIAL:] = 0
    return weights


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor of a model with this config."""
    hidden, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_norm.weight": (d,),
            f"{layer}.self_attn.k_norm.weight": (d,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
        }
        found |= _mlp_shapes(f"{layer}.mlp", config)
    return found


def _mlp_shapes(mlp: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, experts = config["hidden_size"], config.get("num_experts")
    if experts is None:
        return _gated(mlp, hidden, config["intermediate_size"])
    found: dict[str, tuple[int, ...]] = {f"{mlp}.gate.weight": (experts, hidden)}
    for expert in range(experts):
        found |= _gated(f"{mlp}.experts.{expert}", hidden, config["moe_intermediate_size"])
    return found


def _gated(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
