"""Phi-3.5-MoE: SparseMixer, and LongRoPE on both sides of the original length and across it while decoding.

The judge of a crossing is a whole forward pass over the text so far for each token: the reference drops its cache
where its factors change.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from parity.checkpoints.phimoe import BORDER, BORDER_LENGTH
from parity.checkpoints.writing import Reference, write
from parity.device import DEVICE
from parity.direct import Direct
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from inferfleet.engine.admission import Published
from inferfleet.engine.families import load_model
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel
from inferfleet.engine.models.phimoe import sparse_mixer
from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
#: One token, just within the border of 40, on it, and beyond it.
LENGTHS = [1, 13, 30, 39, 40, 41, 57, 90]
CACHES = {
    "blocks of 16": {"block_size": 16},
    "blocks of 8, few": {"block_size": 8, "kv_cache_tokens": 320},
    "no prefix cache": {"block_size": 8, "prefix_caching": False},
    "contiguous": {"paged_attn": False, "max_model_len": 160, "kv_cache_tokens": 8 * 160},
}


@pytest.fixture(scope="module")
def border(tmp_path_factory):
    """border(seed): the judge of a model whose short factors reach 40 positions."""
    written: dict[int, Reference] = {}

    def get(seed: int) -> Reference:
        if seed not in written:
            written[seed] = write(BORDER, seed, tmp_path_factory.mktemp(f"phimoe-border-{seed}-"))
        return written[seed]

    return get


def prompts(judge: Reference, lengths: list[int], seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(judge.vocab_size) for _ in range(length)] for length in lengths]


def llm(judge: Reference, **settings) -> LLM:
    defaults = {"dtype": "float32", "device": str(DEVICE), "max_num_batched_tokens": 32, "max_num_seqs": 8}
    return LLM(str(judge.folder), **{**defaults, "max_model_len": 160, "kv_cache_tokens": 1600, **settings})


def generate(engine: LLM, tokens: list[list[int]], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in tokens], sampling)
    return [output.outputs[0].token_ids for output in outputs]


def assert_stepwise(judge: Reference, ids: list[int], written: list[int]) -> None:
    """Each token is the reference's best after the whole text before it, wherever its lead exceeds the noise."""
    wrong = []
    for place, token in enumerate(written):
        best = judge.logits(ids + written[:place])[-1].topk(2)
        lead = float(best.values[0] - best.values[1])
        if token != int(best.indices[0]) and lead > 2 * judge.tolerance:
            wrong.append((place, lead))
    assert wrong == []


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.1, 0.5])
def test_the_two_choices_and_their_weights_are_those_of_the_reference(jitter):
    # Given scores of all sizes and signs, with ties, zeros, and a best expert far ahead,
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4000, 16, generator=generator) * torch.logspace(-3, 1.5, 4000).unsqueeze(1)
    scores[::7] = scores[::7].round()
    scores[::11] = -scores[::11].abs()
    scores[5], scores[6] = 0.0, -3.0
    # when two experts are chosen for each token,
    ids, weights = sparse_mixer(scores, jitter)
    # then they and their weights are exactly the reference's.
    expected_weights, expected_ids = sparsemixer(scores, jitter_eps=jitter, training=False)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


def test_the_second_choice_measures_nearness_over_the_unmasked_scores():
    # Given a best expert of -1 and two others at -10 and -11, of which the reference measures the distance over 11,
    ids, weights = sparse_mixer(torch.tensor([[-1.0, -10.0, -11.0]]), 0.05)
    # then the third is near enough to the second to weigh (1/11 is within 0.1), and the first weighs alone.
    assert ids.tolist() == [[0, 1]]
    assert weights[0, 0] == 1 and weights[0, 1] == pytest.approx(1 / (1 + torch.e**-1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("block_size", "chunk"), [(8, 5), (None, 16)])
def test_logits_on_both_sides_of_the_border_are_the_references_in_one_batch(seed, block_size, chunk, border, load):
    # Given prompts of which some are longer than the short factors reach,
    judge = border(seed)
    tokens = prompts(judge, [*LENGTHS, 128, 64])
    # when they are computed together, in chunks,
    cache = Direct(load(judge.folder), block_size=block_size or 16, paged=block_size is not None)
    scores = cache.score(tokens, chunk)
    # then every logit is the reference's: a long prompt's first chunk already has the long factors.
    worst = max(float((ours - judge.logits(ids)).abs().max()) for ours, ids in zip(scores, tokens, strict=True))
    assert worst <= judge.tolerance


def test_the_two_sets_of_factors_are_different_models(border):
    # Given one text, just within the border and just beyond it, then the logits at its tokens have nothing in common,
    judge = border(0)
    ids = prompts(judge, [BORDER_LENGTH + 1])[0]
    within, beyond = judge.logits(ids[:-1]), judge.logits(ids)[:-1]
    # so that nothing in this file could pass with the wrong set.
    assert float((within - beyond).abs().max()) > 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cache", CACHES)
def test_greedy_text_across_the_border_is_the_references_step_by_step(cache, seed, border):
    # Given prompts within the border, on it and beyond, all of which write 64 tokens,
    judge = border(seed)
    tokens = prompts(judge, LENGTHS)
    engine = llm(judge, **CACHES[cache])
    # when all run at once, and one that crosses runs alone,
    together = generate(engine, tokens)
    alone = generate(llm(judge, **CACHES[cache]), tokens[2:3])[0]
    # then each token is the reference's after the text before it.
    for ids, written in zip([*tokens, tokens[2]], [*together, alone], strict=True):
        assert len(written) == 64
        assert_stepwise(judge, ids, written)
    if "few" in cache and seed == 0:  # the other model has a window, and needs no more blocks than that
        assert engine.engine.stats()["preemptions"] > 0


def test_text_across_the_border_is_what_the_reference_itself_generates(border):
    # Given a prompt whose answer crosses, when the reference generates, dropping its cache there,
    judge = border(0)
    ids = prompts(judge, [30], seed=3)[0]
    tokens = torch.tensor([ids])
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = judge.model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(ids) :].tolist()
    # then ours is the same text.
    assert generate(llm(judge), [ids])[0] == theirs


def test_a_prefix_is_shared_on_each_side_of_the_border_and_never_across(border):
    # Given a beginning of 24 tokens that a long prompt and its answer have left in the cache,
    judge = border(0)
    beginning, tail, others = prompts(judge, [24, 30, 4], seed=5)
    engine = llm(judge, block_size=8)
    generate(engine, [beginning + tail])
    # when prompts with it come, short, short again, and long,
    cached = []
    for ids in (beginning + others, beginning + others[:2], beginning + others * 5):
        output = engine.generate([{"prompt_token_ids": ids}], GREEDY)[0]
        cached.append(output.num_cached_tokens)
        # then the texts are the reference's,
        assert_stepwise(judge, ids, output.outputs[0].token_ids)
    # and each found what its own set of factors had computed.
    assert cached == [0, 24, 24]


def test_several_answers_to_one_prompt_cross_as_each_would_alone(border):
    # Given three sampled answers to one prompt near the border,
    judge = border(0)
    ids = prompts(judge, [36], seed=6)[0]
    sampling = SamplingParams(n=3, seed=11, max_tokens=24, ignore_eos=True, top_k=5)
    busy = llm(judge, block_size=8)
    # when they are written among others, with a prefix cache, and without both,
    crowd = [{"prompt_token_ids": other} for other in prompts(judge, LENGTHS, seed=7)]
    together = busy.generate([{"prompt_token_ids": ids}, *crowd], [sampling, *[GREEDY] * len(crowd)])[0]
    quiet = llm(judge, paged_attn=False, max_num_seqs=1).generate([{"prompt_token_ids": ids}], sampling)[0]
    # then they are the same three texts.
    texts = [answer.token_ids for answer in together.outputs]
    assert texts == [answer.token_ids for answer in quiet.outputs]
    assert len(set(map(tuple, texts))) == 3


@pytest.mark.parametrize("told", [2, 10, 11, 30])
def test_an_answer_that_goes_on_after_a_restart_is_the_same_on_either_side(told, border):
    # Given an answer that crosses with its 11th token, of which an earlier run has published a part,
    judge = border(0)
    ids = prompts(judge, [30], seed=8)[0]
    whole = generate(llm(judge), [ids])[0]
    engine = llm(judge).engine
    # when another engine goes on after that part,
    engine.add("job", ids, GREEDY, published={0: Published(tuple(whole[:told]), "")})
    rest = []
    while engine.has_work:
        rest += [token for delta in engine.step().deltas for token in delta.token_ids]
    # then it writes the rest.
    assert whole[:told] + rest == whole


@pytest.mark.parametrize("length", [BORDER_LENGTH, BORDER_LENGTH + 1, 100])
def test_scores_are_those_of_one_pass_over_the_whole_text(length, border):
    judge = border(0)
    ids = prompts(judge, [length], seed=9)[0]
    assert float((llm(judge).score(ids).cpu() - judge.logits(ids)).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("seed", SEEDS)
def test_bfloat16_is_finite_beyond_the_border(seed, border, load):
    judge = border(seed)
    scores = Direct(load(judge.folder, "bfloat16"), dtype=torch.bfloat16).score(prompts(judge, [90]), 16)[0]
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize(
    ("change", "rope_change", "error", "says"),
    [
        ({}, {"short_factor": [1.0]}, BadModelConfig, "short_factor must hold 8 positive numbers"),
        ({}, {"long_factor": [0.0] * 8}, BadModelConfig, "long_factor must hold 8 positive numbers"),
        ({}, {"long_factor": ["1"] * 8}, BadModelConfig, "long_factor must hold 8 positive numbers"),
        ({}, {"long_mscale": None}, BadModelConfig, "long_mscale is missing"),
        ({}, {"original_max_position_embeddings": None}, BadModelConfig, "original_max_position_embeddings is missing"),
        ({}, {"type": "yarn"}, UnsupportedModel, "rope_type is 'yarn'; this family has only default and longrope"),
        ({"num_experts_per_tok": 4}, {}, UnsupportedModel, "num_experts_per_tok is 4"),
        ({"num_local_experts": 1}, {}, BadModelConfig, "num_local_experts must be an integer of at least 2"),
        ({"tie_word_embeddings": True}, {}, UnsupportedModel, "lm_head_bias is True"),
        ({"hidden_act": "relu"}, {}, UnsupportedModel, "hidden_act is 'relu'"),
    ],
)
def test_a_wrong_field_is_named(change, rope_change, error, says, border, tmp_path):
    # Given a complete configuration in the hub's words, when one field is wrong, then the error names it.
    folder = border(0).folder
    config = json.loads((folder / "config.json").read_text()) | change
    config["rope_scaling"] |= rope_change
    config.pop("original_max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(error, match=says):
        load_model(str(tmp_path), device=str(DEVICE))
