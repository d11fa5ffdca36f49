"""The registered families at their published sizes, without any weights: how much they hold, and what a token costs."""

from __future__ import annotations

import math

import pytest
import torch

from inferfleet.engine.families import find_family
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.place import Place

S, F = "sliding_attention", "full_attention"
GEMMA = {
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 0,
}
GEMMA_3N = {
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "laurel_rank": 64,
}
QWEN = {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960}


def sizes(hidden, wide, layers, heads, kv_heads, **others):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, (hidden, wide, layers, heads, kv_heads), strict=True)), **others}


LLAMA4 = sizes(5120, 8192, 48, 40, 8, head_dim=128, intermediate_size_mlp=16_384, no_rope_layers=[]) | {
    "vocab_size": 202_048,
    "max_position_embeddings": 1_048_576,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
}
LONG_ROPE = {"short_factor": [1.0] * 64, "long_factor": [8.0] * 64, "short_mscale": 1.243, "long_mscale": 1.243}
LONG_ROPE |= {"type": "longrope", "original_max_position_embeddings": 4096}
LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163_840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0},
}


def routed(count, top_k, width, shared, dense, **others):
    names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    return {**dict(zip(names, (count, top_k, width, shared), strict=True)), "first_k_dense_replace": dense, **others}


LARGE = {"attention_k_eq_v": True, "sliding_window": 1024}
#: name -> (architecture, config, billions of weights of the text model, {window or None: KV bytes a token in bfloat16})
PUBLISHED = {
    "DeepSeek V2-Lite": (
        "DeepseekV2ForCausalLM",
        LATENT | sizes(2048, 10_944, 27, 16, 16, vocab_size=102_400) | routed(64, 6, 1408, 2, 1),
        15.71,
        {None: 27 * 1152},
    ),
    "DeepSeek V2": (
        "DeepseekV2ForCausalLM",
        LATENT
        | sizes(5120, 12_288, 60, 128, 128, vocab_size=102_400, q_lora_rank=1536)
        | routed(160, 6, 1536, 2, 1, topk_method="group_limited_greedy", n_group=8, topk_group=3),
        235.7,
        {None: 60 * 1152},
    ),
    "DeepSeek V3": (
        "DeepseekV3ForCausalLM",
        LATENT
        | sizes(7168, 18_432, 61, 128, 128, vocab_size=129_280, q_lora_rank=1536)
        | routed(256, 8, 2048, 1, 3, n_group=8, topk_group=4),
        671.0,
        {None: 61 * 1152},
    ),
    "Gemma 4 E2B": (
        "Gemma4ForConditionalGeneration",
        GEMMA
        | sizes(1536, 6144, 35, 8, 1, layer_types=[S, S, S, S, F] * 7, num_kv_shared_layers=20, sliding_window=512)
        | {"use_double_wide_mlp": True, "hidden_size_per_layer_input": 256},
        4.63,
        {512: 12 * 1024, None: 6 * 1024},
    ),
    "Gemma 4 E4B": (
        "Gemma4ForConditionalGeneration",
        GEMMA
        | sizes(2560, 10_240, 42, 8, 2, num_kv_shared_layers=18, sliding_window=512)
        | {"hidden_size_per_layer_input": 256},
        7.46,
        {512: 20 * 2048, None: 16 * 1024},
    ),
    "Gemma 4 31B": (
        "Gemma4ForConditionalGeneration",
        GEMMA | LARGE | sizes(5376, 21_504, 60, 32, 16, num_global_key_value_heads=4),
        30.7,
        {1024: 50 * 16_384, None: 80 * 1024},
    ),
    "Gemma 4 26B-A4B": (
        "Gemma4ForConditionalGeneration",
        GEMMA
        | LARGE
        | sizes(2816, 2112, 30, 16, 8, num_global_key_value_heads=2)
        | {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        25.2,
        {1024: 25 * 8192, None: 20 * 1024},
    ),
    "Llama 4 Scout": (
        "Llama4ForConditionalGeneration",
        LLAMA4 | {"num_local_experts": 16, "interleave_moe_layer_step": 1},
        107.77,
        {8192: 36 * 4096, None: 48 * 1024},
    ),
    "Llama 4 Maverick": (
        "Llama4ForConditionalGeneration",
        LLAMA4 | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
        400.71,
        {8192: 36 * 4096, None: 48 * 1024},
    ),
    "Gemma 3n E4B": (
        "Gemma3nForConditionalGeneration",
        GEMMA_3N | sizes(2048, [16_384] * 35, 35, 8, 2, num_kv_shared_layers=15),
        6.84,
        {512: 16 * 2048, None: 4 * 2048},
    ),
    "Gemma 3n E2B": (
        "Gemma3nForConditionalGeneration",
        GEMMA_3N | sizes(2048, [8192] * 30, 30, 8, 2, num_kv_shared_layers=10),
        4.44,
        {512: 16 * 2048, None: 4 * 2048},
    ),
    "Qwen3 0.6B": (
        "Qwen3ForCausalLM",
        QWEN | sizes(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
        0.596,
        {None: 112 * 1024},
    ),
    "Qwen3 8B": ("Qwen3ForCausalLM", QWEN | sizes(4096, 12_288, 36, 32, 8), 8.19, {None: 144 * 1024}),
    "Qwen3 30B-A3B": (
        "Qwen3MoeForCausalLM",
        QWEN | sizes(2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        30.5,
        {None: 96 * 1024},
    ),
    "Qwen3-Next 80B-A3B": (
        "Qwen3NextForCausalLM",
        QWEN | sizes(2048, 5120, 48, 16, 2, head_dim=256, num_experts=512, full_attention_interval=4),
        79.7,
        {None: 24 * 1024},
    ),
    "Phi-3.5-MoE": (
        "PhiMoEForCausalLM",
        sizes(4096, 6400, 32, 32, 8, num_local_experts=16, attention_bias=True, lm_head_bias=True)
        | {"vocab_size": 32_064, "max_position_embeddings": 131_072, "sliding_window": 131_072}
        | {"rope_scaling": LONG_ROPE, "rope_theta": 10_000.0},
        41.87,
        {None: 128 * 1024},
    ),
    "Qwen3-VL 8B": (
        "Qwen3VLForConditionalGeneration",
        QWEN | sizes(4096, 12_288, 36, 32, 8),
        8.19,
        {None: 144 * 1024},
    ),
    "Qwen3-VL 30B-A3B": (
        "Qwen3VLMoeForConditionalGeneration",
        QWEN | sizes(2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        30.5,
        {None: 96 * 1024},
    ),
}


def build(name):
    architecture, config, *_ = PUBLISHED[name]
    whole = {"text_config": config} if "Conditional" in architecture else config
    return find_family(architecture)[1](whole, place=Place(torch.bfloat16, torch.device("meta")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_holds_as_many_weights_and_costs_as_much_cache_as_it_should(name):
    # Given a published configuration, when its model is built without memory,
    model = build(name)
    billions, cache = PUBLISHED[name][2:]
    # then it has the published number of weights,
    held = sum(math.prod(slot.shape) for slot in all_slots(model).tensors.values())
    assert held / 1e9 == pytest.approx(billions, rel=2e-3)
    # and a token costs the bytes that its layers store, in the windowed and in the unbounded part.
    spec = model.cache_spec
    assert {sight.span: 2 * spec.elements_per_token(group) for group, sight in enumerate(spec.sights)} == cache


#: A few published tensors of each kind of layer, with their shapes.
TENSORS = {
    "Gemma 4 E2B": {
        "layers.13.self_attn.k_proj.weight": [256, 1536],
        "layers.14.self_attn.v_proj.weight": [512, 1536],
        "layers.14.mlp.gate_proj.weight": [6144, 1536],
        "layers.15.mlp.gate_proj.weight": [12_288, 1536],
        "layers.15.per_layer_input_gate.weight": [256, 1536],
        "layers.15.layer_scalar": [1],
        "layers.34.self_attn.q_norm.weight": [512],
        "embed_tokens_per_layer.weight": [262_144, 35 * 256],
        "per_layer_model_projection.weight": [35 * 256, 1536],
        "per_layer_projection_norm.weight": [256],
    },
    "Gemma 3n E4B": {
        "layers.19.self_attn.k_proj.weight": [512, 2048],
        "layers.20.altup.correct_output_scale": [2048],
        "layers.20.altup.correction_coefs.weight": [4, 4],
        "layers.20.altup.prediction_coefs.weight": [16, 4],
        "layers.20.altup.modality_router.weight": [4, 2048],
        "layers.20.laurel.linear_left.weight": [64, 2048],
        "layers.34.mlp.down_proj.weight": [2048, 16_384],
        "altup_projections.2.weight": [2048, 2048],
        "altup_unembed_projections.2.weight": [2048, 2048],
        "embed_tokens_per_layer.weight": [262_144, 35 * 256],
    },
    "Gemma 4 31B": {
        "layers.4.self_attn.k_proj.weight": [16 * 256, 5376],
        "layers.4.self_attn.v_proj.weight": [16 * 256, 5376],
        "layers.5.self_attn.q_proj.weight": [32 * 512, 5376],
        "layers.5.self_attn.k_proj.weight": [4 * 512, 5376],
    },
    "Gemma 4 26B-A4B": {
        "layers.0.router.proj.weight": [128, 2816],
        "layers.0.router.scale": [2816],
        "layers.0.router.per_expert_scale": [128],
        "layers.0.experts.gate_up_proj": [128, 2 * 704, 2816],
        "layers.0.experts.down_proj": [128, 2816, 704],
        "layers.0.post_feedforward_layernorm_1.weight": [2816],
        "layers.0.pre_feedforward_layernorm_2.weight": [2816],
    },
    "Phi-3.5-MoE": {
        "layers.0.block_sparse_moe.gate.weight": [16, 4096],
        "layers.31.block_sparse_moe.experts.15.w1.weight": [6400, 4096],
        "layers.31.block_sparse_moe.experts.15.w3.weight": [6400, 4096],
        "layers.31.block_sparse_moe.experts.15.w2.weight": [4096, 6400],
        "layers.0.self_attn.k_proj.bias": [1024],
        "layers.0.self_attn.o_proj.bias": [4096],
        "layers.0.post_attention_layernorm.bias": [4096],
        "norm.bias": [4096],
    },
    "Qwen3-VL 30B-A3B": {
        "layers.0.mlp.gate.weight": [128, 2048],
        "layers.0.mlp.experts.gate_up_proj": [128, 2048, 2 * 768],
        "layers.0.mlp.experts.down_proj": [128, 768, 2048],
        "layers.47.self_attn.k_norm.weight": [128],
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_published_tensor_names_and_shapes_have_their_places(name):
    slots = build(name)
    found = all_slots(slots).named(slots._checkpoint_name)
    places = {**found.tensors, **{stack: slot for stack, (slot, _) in found.stacks.items()}}
    wanted = {f"{slots.prefix}{tensor}": shape for tensor, shape in TENSORS[name].items()}
    for tensor, shape in wanted.items():
        assert tuple(shape) in (places[tensor].shape, *places[tensor].others), tensor


def test_layers_that_share_or_derive_have_no_place_for_what_they_do_not_own():
    shared, derived = build("Gemma 4 E2B"), build("Gemma 4 31B")
    assert not {f"layers.20.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")} & set(
        all_slots(build("Gemma 3n E4B")).tensors
    )
    assert not {f"layers.15.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")} & set(
        all_slots(shared).tensors
    )
    assert "layers.5.self_attn.v_proj.weight" not in all_slots(derived).tensors
