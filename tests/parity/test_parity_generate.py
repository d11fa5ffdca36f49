"""64 greedy tokens against transformers, through the whole offline engine: scheduler, cache, prefix cache, sampler."""

from __future__ import annotations

import random

import pytest
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import Reference
from parity.device import DEVICE

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.sight import EVERYTHING

NAMES = list(ARCHITECTURES)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
#: Prompts are chunked at this many tokens a step; the windows of the shapes are 7 to 33.
CHUNK = 32
CACHES = {
    "blocks of 16": {"block_size": 16},
    "blocks of 8": {"block_size": 8},
    "blocks of 32": {"block_size": 32},
    "contiguous": {"paged_attn": False},
}


def llm(judge: Reference, **settings) -> LLM:
    defaults = {"dtype": "float32", "device": str(DEVICE), "max_num_batched_tokens": CHUNK, "max_num_seqs": 16}
    return LLM(str(judge.folder), **{**defaults, "max_model_len": 256, "kv_cache_tokens": 4096, **settings})


def prompts(judge: Reference, seed: int, lengths: list[int]) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(judge.vocab_size) for _ in range(length)] for length in lengths]


def generate(engine: LLM, tokens: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in tokens], GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


def assert_greedy(judge: Reference, ids: list[int], written: list[int]) -> None:
    """Each written token is the reference's best after the same text, wherever its lead exceeds the noise."""
    assert len(written) == GREEDY.max_tokens
    logits = judge.logits(ids + written)[len(ids) - 1 : -1]
    best = logits.topk(2)
    leads = (best.values[:, 0] - best.values[:, 1]).tolist()
    wrong = [
        (place, lead)
        for place, (token, lead) in enumerate(zip(written, leads, strict=True))
        if token != int(best.indices[place, 0]) and lead > 2 * judge.tolerance
    ]
    assert wrong == []


def matrix():
    for name in NAMES:
        for seed in range(6):
            for number, cache in enumerate(CACHES):
                sample = seed == 0 and number == (NAMES.index(name) + 1) % len(CACHES)
                yield pytest.param(name, seed, cache, marks=() if sample else pytest.mark.slow)


@pytest.mark.parametrize(("name", "seed", "cache"), list(matrix()))
def test_greedy_text_is_the_references_alone_and_in_a_batch_of_sixteen(name, seed, cache, reference):
    # Given prompts from one token to several windows and chunks,
    judge = reference(name, seed)
    tokens = prompts(judge, seed, [1, 2, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 65, 90, 128])
    engine = llm(judge, prefix_caching=False, **CACHES[cache])
    # when all run at once, and one of them alone,
    together = generate(engine, tokens)
    alone = generate(engine, tokens[12:13])[0]
    # then every text is the reference's.
    for ids, written in zip(tokens, together, strict=True):
        assert_greedy(judge, ids, written)
    assert_greedy(judge, tokens[12], alone)


@pytest.mark.parametrize("name", NAMES)
def test_sixty_four_tokens_equal_those_that_transformers_writes_step_by_step(name, reference):
    # Given a prompt longer than the window, when both write 64 tokens, each from its own cache,
    judge = reference(name, 1)
    ids = prompts(judge, 5, [45])[0]
    expected, leads = judge.greedy(ids, 64)
    written = generate(llm(judge), [ids])[0]
    # then they are equal up to the first place where the reference itself is undecided.
    certain = next((place for place, lead in enumerate(leads) if lead <= 2 * judge.tolerance), 64)
    assert certain >= 16
    assert written[:certain] == expected[:certain]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4, 5))])
@pytest.mark.parametrize("name", NAMES)
def test_text_after_a_prefix_hit_is_the_references(name, seed, reference):
    # Given a prompt whose beginning has been computed for another,
    judge = reference(name, seed)
    shared, first, second = prompts(judge, 11, [70, 6, 21])
    engine = llm(judge, block_size=8)
    cold = generate(engine, [shared + first])[0]
    # when it is asked for,
    output = engine.generate([{"prompt_token_ids": shared + second}], GREEDY)[0]
    # then the common blocks are not computed again, and both texts are the reference's.
    assert output.num_cached_tokens == 64
    assert_greedy(judge, shared + first, cold)
    assert_greedy(judge, shared + second, output.outputs[0].token_ids)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4, 5))])
@pytest.mark.parametrize("name", NAMES)
def test_text_across_a_preemption_is_the_references(name, seed, reference, load):
    # Given a cache that holds the beginnings of all answers but not their ends (a row of a model with windows alone
    # grows no further than its window),
    judge = reference(name, seed)
    grows = EVERYTHING in load(judge.folder).cache_spec.sights
    tokens = prompts(judge, 13, [40, 33, 50, 21] if grows else [6, 5, 4, 3, 7, 2])
    room = 240 if grows else 96
    engine = llm(judge, block_size=8, kv_cache_tokens=room, max_model_len=128)
    # when they run together, some give their blocks back and are computed again,
    written = generate(engine, tokens)
    # then nobody's text shows it.
    assert engine.engine.stats()["preemptions"] > 0
    for ids, answer in zip(tokens, written, strict=True):
        assert_greedy(judge, ids, answer)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_offline_engine_are_the_references_logits(name, reference):
    # Given a prompt of several chunks, when it is scored, then every logit is the reference's.
    judge = reference(name, 0)
    ids = prompts(judge, 17, [100])[0]
    assert float((llm(judge).score(ids).cpu() - judge.logits(ids)).abs().max()) <= judge.tolerance
