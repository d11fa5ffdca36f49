"""What is special about Qwen3-VL as a text model: placeholders, stacks that lie either way, a padded vocabulary."""

from __future__ import annotations

import json
import random

import pytest
import torch
from parity.checkpoints.qwen3_vl import MEDIA
from parity.direct import Direct

from inferfleet.engine.families import load_model
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel
from inferfleet.engine.offline import LLM
from inferfleet.engine.place import Place
from inferfleet.engine.sampling_params import SamplingParams

BOTH = ["qwen3-vl", "qwen3-vl-moe"]


def tokens(vocab_size: int, count: int) -> list[int]:
    chosen = random.Random(2)
    return [chosen.randrange(vocab_size) for _ in range(count)]


def worst(judge, load, ids: list[int]) -> float:
    scores = Direct(load(judge.folder)).score([ids], 16)[0]
    return float((scores - judge.logits(ids)).abs().max())


@pytest.mark.parametrize("name", BOTH)
def test_placeholders_without_media_read_as_in_the_reference(name, reference, load):
    # Given a prompt with image and video placeholders between vision start and end, but no image and no video,
    judge = reference(name, 0)
    image, video, start, end = MEDIA
    ids = [5, start, image, image, end, 9, start, video, end, video, 30]
    # when it is computed, then each placeholder counts one position and has its own embedding, as in the reference.
    assert worst(judge, load, ids) <= judge.tolerance


def test_a_prompt_beyond_the_original_rotary_length_is_the_references(reference, load):
    # Given a model whose rotary frequencies YaRN stretches from 32 positions to 128, when a prompt has 120 tokens,
    judge = reference("qwen3-vl", 2)
    # then every logit is the reference's.
    assert worst(judge, load, tokens(judge.vocab_size, 120)) <= judge.tolerance


@pytest.mark.parametrize("layout", ["hub", "saved"])
def test_a_stack_of_square_down_matrices_is_read_as_the_other_stack_lies(layout, reference, load):
    # Given experts as wide as the model, in the published orientation or in the one that transformers saves,
    judge = reference("qwen3-vl-moe", 2, layout=layout)
    # when they are loaded, then the model is the same.
    assert worst(judge, load, tokens(judge.vocab_size, 20)) <= judge.tolerance


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("order", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
@pytest.mark.parametrize("width", [4, 8, 5])
def test_stacks_are_told_apart_by_shape_in_any_order_of_arrival(width, order, turned):
    # Given experts in a model of 8 numbers whose joint gate and up, or whose down, or neither, are square,
    place = Place(torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(width)
    stacks = {
        "gate_up_proj": torch.randn(3, 2 * width, 8, generator=generator),
        "down_proj": torch.randn(3, 8, width, generator=generator),
    }
    layer = Experts(3, 8, width, "silu", place=place)
    slots = layer.slots("experts").stacks
    # when the stacks come one after the other as they lie in a file,
    for name in order:
        stack = stacks[name].transpose(1, 2).contiguous() if turned else stacks[name]
        slot, _ = slots[f"experts.{name}"]
        assert slot.takes(stack)
        slot.put(stack)
    layer.pack()
    # then the layer computes with the right matrices.
    x, ids = torch.randn(2, 8, generator=generator), torch.tensor([[1], [2]])
    expected = []
    for row, expert in zip(x, (1, 2), strict=True):
        gate, up = (stacks["gate_up_proj"][expert] @ row).chunk(2)
        expected.append(stacks["down_proj"][expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(layer(x, ids, torch.ones(2, 1)), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_an_id_beyond_the_tokenizer_has_no_text_and_hurts_nothing(name, reference):
    # Given a vocabulary padded beyond the 261 tokens of the tokenizer, and a model made to pick such a token first,
    judge = reference(name, 0)
    llm = LLM(str(judge.folder), dtype="float32", device="cpu", max_model_len=64, kv_cache_tokens=256)
    padded = judge.vocab_size - 1
    only = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logit_bias={padded: 100.0}, logprobs=2)
    # when it writes and reads them, with log probabilities, which name tokens too,
    answer = llm.generate([{"prompt_token_ids": [5, padded, 6]}], only)[0].outputs[0]
    # then there is no text and no error.
    assert answer.token_ids == [padded] * 3
    assert answer.text == "" and len(answer.logprobs) == 3


def test_norm_topk_prob_and_windows_of_the_configuration_change_nothing(reference, load, tmp_path):
    # Given a copy of a checkpoint whose configuration asks for windows and for weights that do not sum to one,
    judge = reference("qwen3-vl-moe", 0)
    config = json.loads((judge.folder / "config.json").read_text())
    config["text_config"] |= {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(judge.folder / "model.safetensors")
    # when it is loaded, then it is the same model: the reference reads none of these fields.
    ids = tokens(judge.vocab_size, 20)
    assert torch.equal(*(Direct(load(folder)).score([ids], 16)[0] for folder in (judge.folder, tmp_path)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"text_config": None}, BadModelConfig, "text_config"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "text_config: hidden_act is 'gelu'"),
        ({"num_key_value_heads": 3}, BadModelConfig, "do not divide by 3"),
    ],
)
@pytest.mark.parametrize("name", BOTH)
def test_a_wrong_field_is_named(name, change, error, says, reference, tmp_path):
    judge = reference(name, 0)
    config = json.loads((judge.folder / "config.json").read_text())
    target = config if "text_config" in change else config["text_config"]
    target |= change
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 9, "max_position_embeddings": 64}))
    (tmp_path / "model.safetensors").symlink_to(judge.folder / "model.safetensors")
    with pytest.raises(error, match=says):
        load_model(str(tmp_path), device="cpu")
