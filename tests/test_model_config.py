"""What a model folder's configuration must hold, and how a wrong one is told."""

from __future__ import annotations

import json

import pytest
import torch

from inferfleet.engine.config import Fields, read_config
from inferfleet.engine.families import FAMILIES, find_family, load_model
from inferfleet.engine.layers.rotary import Rotary, inverse_frequencies, rope_fields
from inferfleet.engine.model_errors import BadModelConfig, ModelUnavailable, UnsupportedModel
from inferfleet.engine.models.gemma4 import Gemma4Config, layer_plans
from inferfleet.engine.models.qwen3 import layer_windows

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "dtype": "float32",
}


def folder_of(tmp_path, config, generation=None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def test_ends_of_text_come_from_both_files_and_from_the_nested_text_config(tmp_path):
    # Given Gemma 4's way: one id in the text part, one at the top, three in generation_config.json,
    config = {**TINY, "eos_token_id": 106, "text_config": {**TINY, "eos_token_id": 1}}
    read = read_config(folder_of(tmp_path, config, {"eos_token_id": [1, 106, 50], "top_k": 64}))
    # when it is read, then all of them end a text, and the text part gives the sizes.
    assert read.eos_token_ids == (1, 50, 106)
    assert read.vocab_size == 16 and read.generation["top_k"] == 64


@pytest.mark.parametrize(
    ("name", "wanted", "dtype"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        (None, "auto", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_told_otherwise(tmp_path, name, wanted, dtype):
    assert read_config(folder_of(tmp_path, {**TINY, "dtype": None, "torch_dtype": name})).dtype(wanted) == dtype


def test_a_yarn_factor_stretches_the_context(tmp_path):
    # Given Qwen3's long-context recipe, which leaves max_position_embeddings as it was,
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = {**TINY, "max_position_embeddings": 40, "rope_scaling": scaling}
    # then the context is the stretched one.
    assert read_config(folder_of(tmp_path, config)).max_positions == 128


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"auto_map": {"AutoModel": "m.py"}}, UnsupportedModel, "auto_map"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.OtherForCausalLM"}}, UnsupportedModel, "auto_map"),
        ({"architectures": ["MambaForCausalLM"]}, UnsupportedModel, "known are .*Gemma4ForCausalLM"),
        ({"architectures": []}, BadModelConfig, "architectures must hold one name"),
        ({"architectures": None}, BadModelConfig, "field architectures is missing"),
        ({"hidden_size": None}, BadModelConfig, "field hidden_size is missing"),
        ({"hidden_size": "8"}, BadModelConfig, "hidden_size must be an integer"),
        ({"hidden_size": 0}, BadModelConfig, "hidden_size must be an integer of at least 1, not 0"),
        ({"num_key_value_heads": 3}, BadModelConfig, "2 attention heads do not divide by 3"),
        ({"rms_norm_eps": "small"}, BadModelConfig, "rms_norm_eps must be a finite number"),
        ({"hidden_act": "relu"}, UnsupportedModel, "hidden_act is 'relu'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, UnsupportedModel, "rope_type 'spiral' is not one of default"),
        ({"rope_scaling": {"rope_type": "linear"}}, BadModelConfig, "factor is missing"),
        ({"layer_types": ["mamba"]}, BadModelConfig, "layer_types must hold 1 x"),
        ({"eos_token_id": "end"}, BadModelConfig, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": "yes"}, BadModelConfig, "tie_word_embeddings must be true or false"),
        ({"dtype": "int4"}, UnsupportedModel, "dtype 'int4' is not one of"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, error, says):
    # Given an otherwise complete folder, when one field is wrong, then the error names it.
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(error, match=says):
        load_model(str(folder_of(tmp_path, {**TINY, **change})), device="cpu")


def test_code_in_the_repository_for_the_very_architecture_is_left_alone(tmp_path):
    # Given an upload with its author's own code for an architecture that this engine has, when it is read,
    config = {**TINY, "auto_map": {"AutoModelForCausalLM": f"modeling_own.{TINY['architectures'][0]}"}}
    # then it is the architecture as any other upload has it.
    assert read_config(folder_of(tmp_path, config)).architecture == TINY["architectures"][0]


@pytest.mark.parametrize("text", ["", "[]", "{", "\\xff"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadModelConfig, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_told(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_registered_class_exists(architecture):
    family, found = find_family(architecture)
    assert found.__name__ == architecture and architecture.lower().startswith(family.replace("_", ""))


ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, own attention factor": {
        "factor": 3.0,
        "original_max_position_embeddings": 300,
        "attention_factor": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, two scales": {
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.2,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_frequencies_equal_those_of_transformers(name, theta):
    # Given a kind of position encoding in both of its spellings,
    transformers = pytest.importorskip("transformers")
    kind = name.partition(",")[0]
    parameters = {"rope_type": kind, "rope_theta": theta, **ROPES[name]}
    config = transformers.Qwen3Config(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(parameters))
    old = {k: v for k, v in parameters.items() if k != "rope_theta"}
    spellings = [{"rope_parameters": parameters}, {"rope_theta": theta, "rope_scaling": old}]
    # when the frequencies are computed, then they and the attention factor are those of transformers.
    if kind == "default":
        expected, factor = 1.0 / theta ** (torch.arange(0, 64, 2) / 64), 1.0
    else:
        expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config)
    for values in spellings:
        ours, our_factor = inverse_frequencies(rope_fields(Fields(values)), 64, 4096)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("fraction", "factor"), [(0.25, 1.0), (0.5, 4.0), (1.0, 1.0)])
def test_proportional_frequencies_equal_those_of_transformers(fraction, factor):
    # Given Gemma 4's full layers,
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": fraction, "factor": factor}
    both = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.Gemma4TextConfig(rope_parameters=both, num_hidden_layers=6, global_head_dim=512)
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["proportional"]
    expected, _ = compute(config, layer_type="full_attention")
    # then the slow pairs stand still, and the exponents are over the whole head.
    ours, _ = inverse_frequencies(Fields(rope), 512, 4096)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert int((ours == 0).sum()) == 256 - int(256 * fraction)


def test_angles_stay_exact_at_the_far_end_of_a_long_context():
    # Given positions up to 262143, when angles are computed in float32, then cos is that of the exact product, as far
    # as float32 holds the product itself: positions * frequency loses at most 2^-24 of 262143.
    rotary = Rotary(Fields({"rope_type": "default", "rope_theta": 1e6}), 64, 262_144, device=torch.device("cpu"))
    positions = torch.tensor([0, 1, 131_071, 262_143])
    cos, sin = rotary(positions)
    exact = positions.double().unsqueeze(1) * rotary.frequencies.double()
    assert float((cos[:, :32] - exact.cos()).abs().max()) < 262_143 * 2**-24 * 1.01
    assert cos.shape == sin.shape == (4, 64) and bool((cos[:, :32] == cos[:, 32:]).all())


GEMMA = {
    **TINY,
    "num_hidden_layers": 7,
    "sliding_window": 5,
    "global_head_dim": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 16,
}


def test_gemma_layers_share_with_the_last_owner_of_their_kind_and_the_last_is_full():
    # Given seven layers of which the upper three own no keys and values, and a list that ends in a windowed one,
    plans = layer_plans(Fields(GEMMA))
    # then the last is full all the same, each sharing layer reads the right one and is twice as wide.
    assert [plan.kv_layer for plan in plans] == [0, 1, 2, 3, 3, 2, 2]
    assert [plan.window for plan in plans] == [5, 5, None, 5, 5, None, None]
    assert [plan.head_dim for plan in plans] == [4, 4, 6, 4, 4, 6, 6]
    assert [plan.intermediate for plan in plans] == [8, 8, 8, 8, 16, 16, 16]


def test_gemma_global_heads_count_only_where_values_are_keys():
    # Given num_global_key_value_heads, when attention_k_eq_v is off, then it means nothing, as in transformers.
    sizes = {**GEMMA, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    assert {plan.num_kv_heads for plan in layer_plans(Fields(sizes))} == {2}
    equal = layer_plans(Fields({**sizes, "attention_k_eq_v": True}))
    assert [plan.num_kv_heads for plan in equal] == [2, 2, 1, 2, 2, 1, 1]
    assert [plan.v_from_k for plan in equal] == [False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers is 7, but there are 7 layers"),
        ({"num_kv_shared_layers": 5}, "no owner of its kind"),
        ({"vocab_size_per_layer_input": 15}, "vocab_size_per_layer_input is smaller"),
        ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3}, "top_k_experts is 3, more than the 2"),
        ({"enable_moe_block": True}, "num_experts is missing"),
        ({"per_layer_config": {"2": {"head_dim": 6}}}, "layers of one kind must all have the same heads"),
    ],
)
def test_an_impossible_gemma_is_named(change, says):
    with pytest.raises(BadModelConfig, match=says):
        Gemma4Config.read(Fields({**GEMMA, **change}))


def test_gemma_that_looks_both_ways_is_refused():
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention is 'all'"):
        Gemma4Config.read(Fields({**GEMMA, "use_bidirectional_attention": "all"}))


def test_qwen_windows_need_their_switch():
    sizes = {"num_hidden_layers": 4, "sliding_window": 9, "max_window_layers": 2}
    assert layer_windows(Fields(sizes)) == (None,) * 4
    assert layer_windows(Fields({**sizes, "use_sliding_window": True})) == (None, None, 9, 9)
    assert layer_windows(Fields({**sizes, "use_sliding_window": True, "sliding_window": None})) == (None,) * 4
