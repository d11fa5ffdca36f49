"""A shape of 200 to 300 million parameters for every text family, in the keys of its published config.json.

Each keeps what makes its family slow or fast (windows, latents, states, mixtures, per-layer embeddings) in about the
published proportions. Weights are random, so the shapes are for timing only.
"""

from __future__ import annotations

from typing import Any

VOCAB = 32768
S, F = "sliding_attention", "full_attention"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "eos_token_id": VOCAB - 3,
    "pad_token_id": VOCAB - 1,
    "torch_dtype": "bfloat16",
}


def _sizes(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return _COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


_GEMMA4 = {"sliding_window": 512, "final_logit_softcapping": 30.0, "tie_word_embeddings": True}
_DEEPSEEK = {
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 384,
}
_QWEN = {"hidden_act": "silu", "attention_bias": False, "rope_theta": 1e6}
_QWEN_MOE = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": True,
}


def _text(architecture: str, text: dict[str, Any]) -> dict[str, Any]:
    """A multimodal checkpoint's configuration around its text model's."""
    return {
        "architectures": [architecture],
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "eos_token_id": _COMMON["eos_token_id"],
        "torch_dtype": "bfloat16",
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], **_sizes(12, 1024, 3072, 16, 8, 128), **_QWEN}
    | {"tie_word_embeddings": True},
    "qwen3-moe": {"architectures": ["Qwen3MoeForCausalLM"], **_sizes(12, 640, 1280, 10, 2, 64), **_QWEN, **_QWEN_MOE},
    "qwen3-vl": _text(
        "Qwen3VLForConditionalGeneration",
        {
            **_sizes(12, 1024, 3072, 16, 8, 128),
            **_QWEN,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
    ),
    "qwen3-vl-moe": _text(
        "Qwen3VLMoeForConditionalGeneration",
        {
            **_sizes(12, 640, 1280, 10, 2, 64),
            **_QWEN,
            **_QWEN_MOE,
            "rope_scaling": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        },
    ),
    "qwen3-next": {
        "architectures": ["Qwen3NextForCausalLM"],
        **_sizes(12, 768, 1536, 8, 2, 128),
        **_QWEN,
        **_QWEN_MOE,
        "num_experts": 12,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 512,
    },
    "gemma4-e2b": {
        "architectures": ["Gemma4ForCausalLM"],
        **_sizes(15, 768, 2304, 8, 1, 128),
        **_GEMMA4,
        "layer_types": [S, S, S, S, F] * 3,
        "global_head_dim": 256,
        "num_kv_shared_layers": 8,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 128,
        "vocab_size_per_layer_input": VOCAB,
        "attention_k_eq_v": False,
    },
    "gemma4-26b-a4b": {
        "architectures": ["Gemma4ForCausalLM"],
        **_sizes(12, 640, 1024, 8, 4, 64),
        **_GEMMA4,
        "global_head_dim": 128,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 448,
    },
    "gemma3n": {
        "architectures": ["Gemma3nForCausalLM"],
        **_sizes(15, 768, 4096, 8, 2, 96),
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "layer_types": [S, S, S, S, F] * 3,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 96,
        "vocab_size_per_layer_input": VOCAB,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.95] * 5 + [0.0] * 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "deepseek-v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **_sizes(12, 768, 2048, 12, 12, 96),
        **_DEEPSEEK,
        "n_routed_experts": 16,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_sizes(12, 768, 2048, 12, 12, 96),
        **_DEEPSEEK,
        "n_routed_experts": 16,
        "q_lora_rank": 384,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "phi3.5-moe": {
        "architectures": ["PhiMoEForCausalLM"],
        **_sizes(12, 768, 1152, 12, 4, 64),
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
        "attention_bias": True,
        "lm_head_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 32,
            "long_factor": [2.0] * 32,
            "short_mscale": 1.2432,
            "long_mscale": 1.2432,
            "original_max_position_embeddings": 4096,
        },
    },
    "llama4": {
        "architectures": ["Llama4ForCausalLM"],
        **_sizes(12, 768, 1024, 12, 4, 64),
        "intermediate_size_mlp": 2048,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [],
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 1024,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
