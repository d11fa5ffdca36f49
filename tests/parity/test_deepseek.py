"""What only DeepSeek has: latents as the one cache, scores stretched by YaRN, groups of experts, layers to skip."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from parity.checkpoints.writing import write
from parity.device import CPU, DEVICE
from parity.direct import Direct
from safetensors.torch import load_file, save_file

from inferfleet.engine.config import Fields
from inferfleet.engine.families import load_model
from inferfleet.engine.layers.latent_attention import score_factor
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel, WeightsMismatch
from inferfleet.engine.models import deepseek_v2, deepseek_v3
from inferfleet.engine.offline import LLM
from inferfleet.engine.place import Place
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.kernels import build

NAMES = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]
ON_CPU = Place(torch.float32, CPU)


def prompt(judge, seed: int, length: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(judge.vocab_size) for _ in range(length)]


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_after_a_prefix_hit_continues_over_the_cached_latents(name, reference):
    # Given a model whose YaRN was made for 32 tokens, and a prefix of 80 that another prompt has left in the cache,
    judge = reference(name, 0)
    shared, rest = prompt(judge, 1, 80), prompt(judge, 2, 90)
    engine = LLM(
        str(judge.folder),
        dtype="float32",
        device=str(DEVICE),
        block_size=16,
        max_num_batched_tokens=32,
        max_model_len=256,
        kv_cache_tokens=1024,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    engine.generate([{"prompt_token_ids": [*shared, 1, 2]}], greedy)
    # when 90 more tokens follow it, which takes three chunks, and then an answer,
    output = engine.generate([{"prompt_token_ids": shared + rest}], greedy)[0]
    # then the prefix is not computed again and the answer is the reference's.
    assert output.num_cached_tokens == 80
    written = output.outputs[0].token_ids
    best = judge.logits(shared + rest + written)[len(shared + rest) - 1 : -1].topk(2)
    certain = (best.values[:, 0] - best.values[:, 1]) > 2 * judge.tolerance
    assert certain.sum() > 12
    assert torch.equal(torch.tensor(written)[certain], best.indices[:, 0][certain])


@pytest.mark.skipif(DEVICE != CPU or build.find_compiler() is None, reason="torch's own products sum in another order")
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_gives_bit_for_bit_the_same_in_chunks_as_whole_and_token_by_token(name, reference, load):
    # Given a prompt, when it is computed at once, in chunks, and as decoding would, among other rows,
    judge = reference(name, 0)
    model, ids, other = load(judge.folder), prompt(judge, 3, 150), prompt(judge, 4, 33)
    whole = Direct(model).score([ids], 1000)[0]
    # then the same computation over latents has made every logit.
    for chunk in (37, 1):
        assert torch.equal(Direct(model).score([other, ids], chunk)[1], whole), chunk


@pytest.mark.parametrize(("name", "seed"), [("deepseek-v2-lite", 2), ("deepseek-v2", 2), ("deepseek-v3", 2)])
def test_far_beyond_yarns_original_length_the_logits_are_the_references(name, seed, reference, load):
    # Given YaRN from 24 to 48 tokens on, with unlike mscale and mscale_all_dim, when a prompt is 240 long,
    judge = reference(name, seed)
    ids = prompt(judge, 5, 240)
    scores = Direct(load(judge.folder)).score([ids], 64)[0]
    # then all its positions agree.
    assert float((scores - judge.logits(ids)).abs().max()) <= judge.tolerance


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, (0.1 * math.log(40) + 1) ** 2),
        ({"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, 1.58963),
        ({"rope_type": "yarn", "factor": 40}, 1.0),
        ({"rope_type": "yarn", "factor": 0.5, "mscale_all_dim": 1.0}, 1.0),
        ({"rope_type": "default", "factor": 40, "mscale_all_dim": 1.0}, 1.0),
        ({}, 1.0),
    ],
)
def test_scores_are_multiplied_by_the_square_of_yarns_factor(scaling, factor):
    assert score_factor(Fields(scaling)) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_costs_one_latent_a_layer_and_nothing_else(name, dtype, reference, load):
    # Given a model with its cache of blocks,
    judge = reference(name, 0)
    config = judge.model.config
    cache = Direct(load(judge.folder), block_size=16, dtype=dtype).cache
    # when the memory of all layers is counted,
    held = sum(t.nbytes for tensors in cache.blocks.values() for t in tensors)
    places = next(iter(cache.blocks.values()))[0].shape[:2].numel()
    # then it is the compressed and the turned part of each layer, whatever the number of heads.
    wide = config.kv_lora_rank + config.qk_rope_head_dim
    assert held / places == wide * dtype.itemsize * config.num_hidden_layers
    assert cache.spec.elements_per_token(0) == wide * config.num_hidden_layers


def test_the_layers_that_predict_further_tokens_are_skipped_only_as_many_as_the_config_says(tmp_path):
    # Given a checkpoint whose config.json speaks of two such layers and whose files hold a third,
    write("deepseek-v3", 2, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.layers.5.eh_proj.weight" in tensors
    stranger = {"model.layers.6.eh_proj.weight": tensors["model.layers.5.eh_proj.weight"].clone()}
    save_file(tensors | stranger, tmp_path / "model.safetensors")
    # when it is loaded, then only the third is a stranger.
    with pytest.raises(WeightsMismatch) as caught:
        load_model(str(tmp_path), device="cpu")
    assert caught.value.extra == tuple(stranger) and not caught.value.missing


EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}


def routing(mlp: torch.nn.Module, router: torch.Tensor, x: torch.Tensor) -> dict[int, float]:
    """What a sparse MLP asks of its experts for one token: {expert: weight}."""
    asked: dict[int, float] = {}

    def listen(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        asked.update(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
        return torch.zeros_like(x)

    mlp.router._weight.slot().put(router)
    mlp.router.pack()
    mlp.experts.forward, mlp.shared_experts.forward = listen, lambda x: torch.zeros_like(x)
    mlp(x)
    return asked


def test_v3_never_leaves_the_kept_groups_even_where_every_choice_is_negative():
    # Given experts whose choices (score + bias) are all below 0, so that a forbidden 0 would beat them,
    mlp = deepseek_v3.SparseMLP(Fields(EXPERTS), 8, place=ON_CPU)
    scores = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.2, 0.2, 0.8, 0.25])
    mlp.gate["e_score_correction_bias"].values.fill_(-2.0)
    # when a token is routed,
    asked = routing(mlp, torch.diag(scores.logit()), torch.ones(1, 8))
    # then the group with the best two together wins (not the one with the best), with its scores as weights.
    assert asked == pytest.approx({2: 0.6, 3: 0.5})


def test_v3_chooses_by_score_and_bias_but_weighs_by_score_alone():
    mlp = deepseek_v3.SparseMLP(Fields(EXPERTS | {"norm_topk_prob": True, "topk_group": 4}), 8, place=ON_CPU)
    scores = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.2, 0.2, 0.8, 0.25])
    mlp.gate["e_score_correction_bias"].values.copy_(torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]))
    asked = routing(mlp, torch.diag(scores.logit()), torch.ones(1, 8))
    assert asked == pytest.approx({1: 0.1 / 0.35, 7: 0.25 / 0.35})


def test_v2_keeps_the_group_of_the_best_expert_and_does_not_renormalise():
    fields = Fields(EXPERTS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0})
    mlp = deepseek_v2.SparseMLP(fields, 8, place=ON_CPU)
    scores = torch.tensor([0.30, 0.02, 0.2, 0.18, 0.05, 0.05, 0.1, 0.1])
    asked = routing(mlp, torch.diag(scores.log()), torch.ones(1, 8))
    assert asked == pytest.approx({0: 0.6, 1: 0.04})


def test_layers_are_sparse_from_the_first_dense_ones_on_at_every_step():
    fields = Fields({"first_k_dense_replace": 2, "moe_layer_freq": 3})
    for family in (deepseek_v2, deepseek_v3):
        assert [index for index in range(10) if family.is_sparse(fields, index)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("name", "change", "error", "says"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, UnsupportedModel, "topk_method is 'noaux_tc'"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, UnsupportedModel, "scoring_func is 'sigmoid'"),
        ("deepseek-v2", {"n_group": 3}, BadModelConfig, "n_group 3 and topk_group 3 do not fit 16 experts"),
        ("deepseek-v2", {"num_experts_per_tok": 7}, BadModelConfig, "num_experts_per_tok is 7"),
        ("deepseek-v2", {"mlp_bias": True}, UnsupportedModel, "mlp_bias is True"),
        ("deepseek-v2", {"num_key_value_heads": 2}, UnsupportedModel, "num_key_value_heads is 2"),
        ("deepseek-v2", {"kv_lora_rank": None}, BadModelConfig, "kv_lora_rank is missing"),
        ("deepseek-v2", {"qk_rope_head_dim": 7}, BadModelConfig, "qk_rope_head_dim must be even"),
        ("deepseek-v3", {"topk_method": "greedy"}, UnsupportedModel, "topk_method is 'greedy'"),
        ("deepseek-v3", {"topk_group": 9}, BadModelConfig, "n_group 4 and topk_group 9"),
        ("deepseek-v3", {"n_group": 16}, BadModelConfig, "n_group 16"),
    ],
)
def test_what_a_deepseek_cannot_be_is_refused_by_name(name, change, error, says, reference):
    config = {**json.loads((reference(name, 0).folder / "config.json").read_text()), **change}
    family = deepseek_v2.DeepseekV2ForCausalLM if "v2" in name else deepseek_v3.DeepseekV3ForCausalLM
    with pytest.raises(error, match=says):
        family(config, place=Place(torch.float32, torch.device("meta")))
