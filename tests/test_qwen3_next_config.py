"""What Qwen3-Next reads from config.json, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel
from inferfleet.engine.models.qwen3_next import FULL, LINEAR, Qwen3NextForCausalLM, is_sparse, layer_kinds
from inferfleet.engine.place import Place

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def build(**change):
    return Qwen3NextForCausalLM({**SMALL, **change}, place=Place(torch.float32, torch.device("meta")))


def test_every_fourth_layer_attends_unless_the_file_says_which():
    assert layer_kinds(Fields({"num_hidden_layers": 5})) == (LINEAR, LINEAR, LINEAR, FULL, LINEAR)
    assert layer_kinds(Fields({"num_hidden_layers": 2, "full_attention_interval": 2})) == (LINEAR, FULL)
    assert layer_kinds(Fields({"num_hidden_layers": 2, "layer_types": [FULL, LINEAR]})) == (FULL, LINEAR)


def test_experts_are_in_every_layer_that_no_field_exempts():
    assert [is_sparse(Fields({}), i) for i in range(3)] == [True] * 3
    assert [is_sparse(Fields({"mlp_only_layers": [1]}), i) for i in range(3)] == [True, False, True]
    assert [is_sparse(Fields({"decoder_sparse_step": 2}), i) for i in range(4)] == [False, True, False, True]
    assert not is_sparse(Fields({"num_experts": 0}), 0)


def test_a_row_carries_the_last_inputs_of_the_convolution_and_a_float32_matrix_for_each_value_head():
    state = build().cache_spec.layers[0]
    assert [(part.shape, part.dtype) for part in state.parts] == [((3, 44), None), ((4, 6, 5), torch.float32)]


def test_published_names_have_their_places():
    shapes = {name: tuple(slot.shape) for name, slot in all_slots(build()).tensors.items()}
    assert shapes["layers.0.linear_attn.in_proj_qkvz.weight"] == (64, 16)
    assert shapes["layers.0.linear_attn.in_proj_ba.weight"] == (8, 16)
    assert shapes["layers.0.linear_attn.conv1d.weight"] == (44, 1, 4)
    assert shapes["layers.0.linear_attn.A_log"] == shapes["layers.0.linear_attn.dt_bias"] == (4,)
    assert shapes["layers.0.linear_attn.norm.weight"] == (5,)
    assert shapes["layers.3.self_attn.q_proj.weight"] == (64, 16)
    assert shapes["layers.3.mlp.shared_expert_gate.weight"] == (1, 16)
    assert "layers.0.self_attn.q_proj.weight" not in shapes and "layers.3.linear_attn.A_log" not in shapes


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"linear_num_value_heads": 5}, BadModelConfig, "linear_num_value_heads is 5, not a multiple of the 2"),
        ({"linear_conv_kernel_dim": 1}, BadModelConfig, "linear_conv_kernel_dim must be an integer of at least 2"),
        ({"num_experts_per_tok": 5}, BadModelConfig, "num_experts_per_tok is 5, more than the 4"),
        ({"layer_types": [FULL]}, BadModelConfig, "layer_types must hold 4"),
        ({"layer_types": [FULL] * 3 + ["chunked_attention"]}, BadModelConfig, "layer_types must hold 4"),
        ({"partial_rotary_factor": 0.4}, BadModelConfig, "partial_rotary_factor turns 3 numbers of a head of 8"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, UnsupportedModel, "rope_type 'dynamic'"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
    ],
)
def test_an_impossible_model_is_named(change, error, says):
    with pytest.raises(error, match=says):
        build(**change)


def test_a_sequence_of_the_published_size_carries_seventy_four_mebibytes():
    # Given the published sizes, which are the defaults of absent fields, without experts to keep it short,
    published = {"vocab_size": 8, "hidden_size": 2048, "intermediate_size": 8, "num_hidden_layers": 48}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "num_experts": 0, "max_position_embeddings": 262_144}
    model = Qwen3NextForCausalLM({**published, **heads}, place=Place(torch.bfloat16, torch.device("meta")))
    # then each of 36 layers carries 32 matrices in float32 and three inputs of the convolution in bfloat16.
    each = 32 * 128 * 128 * 4 + 3 * 8192 * 2
    assert model.cache_spec.state_bytes(torch.bfloat16) == 36 * each
