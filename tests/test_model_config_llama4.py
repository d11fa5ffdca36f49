"""What Llama 4's configurations say of the layers, in the words of the first uploads and of today's."""

import pytest
import torch

from inferfleet.engine.config import Fields
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.llama4 import Llama4ForCausalLM, Llama4ForConditionalGeneration, Sharpening, layer_plans
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight

NEAR, ALL = Sight(chunk=8192), Sight()
SIZES = {"num_hidden_layers": 8}
TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 6,
    "intermediate_size_mlp": 10,
    "max_position_embeddings": 64,
}


def kinds(**fields):
    plans = layer_plans(Fields({**SIZES, **fields}))
    return [plan.sight for plan in plans], [plan.has_rope for plan in plans]


@pytest.mark.parametrize("named", [{}, {"no_rope_layers": []}, {"no_rope_layers": None}])
def test_every_fourth_layer_sees_all_and_has_no_rotary_where_the_layers_are_not_named(named):
    assert kinds(**named) == ([NEAR, NEAR, NEAR, ALL] * 2, [True, True, True, False] * 2)
    assert kinds(**named, no_rope_layer_interval=2)[1] == [True, False] * 4


def test_a_one_in_no_rope_layers_means_rotary_and_a_chunk():
    sights, ropes = kinds(no_rope_layers=[0, 1, 1, 0, 1, 1, 1, 1], attention_chunk_size=5)
    assert ropes == [False, True, True, False, True, True, True, True]
    assert [sight.chunk for sight in sights] == [None, 5, 5, None, 5, 5, 5, 5]


def test_layer_types_decide_what_a_layer_sees_and_no_rope_layers_whether_it_turns():
    types = ["full_attention", "chunked_attention"] * 4
    sights, ropes = kinds(layer_types=types, no_rope_layers=[1] * 8)
    assert sights == [ALL, NEAR] * 4
    assert ropes == [True] * 8


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, range(8)),
        ({"interleave_moe_layer_step": 2}, (1, 3, 5, 7)),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0, 4]}, (0, 4)),
        ({"moe_layers": []}, ()),
    ],
)
def test_mixtures_lie_in_every_nth_layer_or_where_moe_layers_says(fields, sparse):
    plans = layer_plans(Fields({**SIZES, **fields}))
    assert [plan.index for plan in plans if plan.is_sparse] == list(sparse)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"no_rope_layers": [1, 1, 0]}, "must name 8 layers"),
        ({"layer_types": ["chunked_attention"] * 7}, "must name 8 layers"),
        ({"layer_types": ["sliding_attention"] * 8}, "the types chunked_attention or full_attention"),
        ({"attention_chunk_size": None}, "attention_chunk_size is null"),
    ],
)
def test_layers_that_cannot_be_are_named(fields, says):
    with pytest.raises(BadModelConfig, match=says):
        layer_plans(Fields({**SIZES, **fields}))


@pytest.mark.parametrize(("value", "is_on"), [(4, True), (True, True), (None, True), (0, False), (False, False)])
def test_temperature_tuning_is_a_switch_that_the_first_uploads_wrote_as_a_number(value, is_on):
    assert (Sharpening.read(Fields({"attn_temperature_tuning": value})) is not None) == is_on


def test_temperature_tuning_of_another_type_is_refused():
    with pytest.raises(BadModelConfig, match="attn_temperature_tuning must be true, false or an integer"):
        Sharpening.read(Fields({"attn_temperature_tuning": "yes"}))


def test_queries_grow_at_every_step_of_positions():
    # Given Scout's settings, then nothing changes before the 8192nd token, and the factor is 1 + 0.1 log(1 + n) after
    # n times as many.
    sharpening = Sharpening.read(Fields({}))
    positions = torch.tensor([0, 8190, 8191, 16_382, 16_383, 10_485_759])
    factors = sharpening.of(positions).flatten()
    steps = torch.tensor([0.0, 0, 1, 1, 2, 1280])
    torch.testing.assert_close(factors, 1 + 0.1 * (1 + steps).log())


def test_more_choices_than_experts_are_refused():
    with pytest.raises(BadModelConfig, match="num_experts_per_tok is 3, more than the 2 experts"):
        build({**TINY, "num_local_experts": 2, "num_experts_per_tok": 3})


def test_experts_are_stored_as_what_x_is_multiplied_by_and_dense_layers_have_their_own_width():
    found = all_slots(build({**TINY, "num_local_experts": 3, "moe_layers": [1]}))
    slots, stacks = found.tensors, found.stacks

    assert stacks["layers.1.feed_forward.experts.gate_up_proj"][0].others == ((3, 8, 12),)
    assert stacks["layers.1.feed_forward.experts.down_proj"][0].others == ((3, 6, 8),)
    assert slots["layers.1.feed_forward.router.weight"].shape == (3, 8)
    assert slots["layers.1.feed_forward.shared_expert.up_proj.weight"].shape == (6, 8)
    assert slots["layers.0.feed_forward.up_proj.weight"].shape == (10, 8)


def test_a_published_checkpoint_names_everything_after_its_language_model():
    place = Place(torch.float32, torch.device("meta"))
    model = Llama4ForConditionalGeneration({"text_config": {**TINY, "moe_layers": []}}, place=place)
    names = set(all_slots(model).named(model._checkpoint_name).tensors)

    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.1.feed_forward.down_proj.weight",
    } <= names
    assert all(name.startswith("language_model.") for name in names)


def build(config):
    return Llama4ForCausalLM(config, place=Place(torch.float32, torch.device("meta")))
