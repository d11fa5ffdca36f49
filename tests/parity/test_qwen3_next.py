"""What only a model with a carried state can get wrong: chunks of odd sizes, prefixes that end inside what was kept."""

from __future__ import annotations

import random

import pytest
from parity.checkpoints.writing import Reference
from parity.direct import Direct
from parity.test_parity_generate import assert_greedy, generate, llm

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

NAME = "qwen3-next"
BLOCK = 8


def text(judge: Reference, seed: int, length: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(judge.vocab_size) for _ in range(length)]


def ask(engine: LLM, ids: list[int], **sampling) -> tuple[int, list[list[int]]]:
    """(tokens found in the cache, the answers)."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **sampling})
    output = engine.generate([{"prompt_token_ids": ids}], params)[0]
    return output.num_cached_tokens, [answer.token_ids for answer in output.outputs]


@pytest.mark.parametrize(
    "chunk", [63, pytest.param(37, marks=pytest.mark.slow), pytest.param(65, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3))])
def test_chunks_of_any_size_give_the_references_logits(seed, chunk, reference, load):
    # Given prompts around the 64 tokens that a chunked form takes at once, and a step whose size fits neither those
    # nor the blocks,
    judge = reference(NAME, seed)
    tokens = [text(judge, length, length) for length in (1, 2, 62, 63, 64, 65, 127, 129, 200)]
    # when they are computed together, then every logit is the reference's.
    scores = Direct(load(judge.folder)).score(tokens, chunk)
    worst = max(float((ours - judge.logits(ids)).abs().max()) for ours, ids in zip(scores, tokens, strict=True))
    assert worst <= judge.tolerance


def test_a_prompt_of_a_thousand_tokens_in_chunks_scores_as_the_reference(reference):
    # Given a prompt of many steps, when it is scored, then no error has grown on the way.
    judge = reference(NAME, 0)
    ids = text(judge, 1, 1000)
    engine = llm(judge, max_num_batched_tokens=150, max_model_len=1024)
    assert float((engine.score(ids).cpu() - judge.logits(ids)).abs().max()) <= judge.tolerance


def test_the_second_request_takes_up_the_state_that_the_first_left_at_the_end_of_their_common_text(reference):
    # Given an engine that has answered one prompt,
    judge = reference(NAME, 1)
    shared = text(judge, 2, 96)
    engine = llm(judge, block_size=BLOCK)
    ask(engine, shared + text(judge, 3, 9))
    # when another begins with the same text,
    ids = shared + text(judge, 4, 14)
    found, (answer,) = ask(engine, ids)
    # then that is not computed again, and its answer is the one of an engine that knew nothing, and the reference's.
    assert 0 < found <= 96
    assert answer == ask(llm(judge, block_size=BLOCK), ids)[1][0]
    assert_greedy(judge, ids, answer)


@pytest.mark.parametrize("common", [2 * BLOCK, 2 * BLOCK + 3, 3 * BLOCK - 1])
def test_prompts_that_share_two_blocks_but_not_three_take_up_nothing_later(common, reference):
    # Given prompts that part at the end of the second block, or inside the third,
    judge = reference(NAME, 2)
    engine = llm(judge, block_size=BLOCK, max_num_batched_tokens=BLOCK)
    shared = text(judge, 5, common)
    ask(engine, shared + text(judge, 6, 40))
    # when the second is asked, then at most those two blocks are taken, and the text is its own.
    ids = shared + text(judge, 7, 40)
    found, (answer,) = ask(engine, ids)
    assert found <= 2 * BLOCK
    assert_greedy(judge, ids, answer)


def test_two_answers_to_one_prompt_part_from_one_state(reference):
    # Given an answer that is written twice, differently,
    judge = reference(NAME, 0)
    ids = text(judge, 8, 45)
    seeded = {"n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 24}
    engine = llm(judge, block_size=BLOCK)
    # when both run at once, then each is what an engine without a prefix cache writes,
    _, answers = ask(engine, ids, **seeded)
    assert answers == ask(llm(judge, block_size=BLOCK, prefix_caching=False), ids, **seeded)[1]
    assert answers[0] != answers[1]
    # and the prompt's greedy text afterwards is the reference's.
    assert_greedy(judge, ids, ask(engine, ids)[1][0])


def test_a_conversation_goes_on_from_the_state_that_its_last_answer_left(reference):
    # Given three turns of which each is the one before, its answer and some words more,
    judge = reference(NAME, 3)
    engine = llm(judge, block_size=BLOCK, max_model_len=512)
    ids, found = text(judge, 9, 30), []
    for turn in range(3):
        cached, (answer,) = ask(engine, ids)
        found.append(cached)
        # when a turn is asked, then its answer is the reference's,
        assert_greedy(judge, ids, answer)
        ids = ids + answer + text(judge, 10 + turn, 5)
    # and each turn after the first finds something.
    assert found[0] == 0 and all(found[1:])


def test_states_given_up_by_preempted_rows_are_computed_again(reference):
    # Given a cache that holds the beginnings of all answers but not their ends, and prompts of which two begin alike,
    judge = reference(NAME, 2)
    shared = text(judge, 20, 24)
    tokens = [shared + text(judge, 21, 9), text(judge, 22, 33), shared + text(judge, 23, 17), text(judge, 24, 5)]
    engine = llm(judge, block_size=BLOCK, kv_cache_tokens=240, max_model_len=128, max_num_batched_tokens=27)
    # when they run together, then nobody's text shows who had to wait.
    written = generate(engine, tokens)
    assert engine.engine.stats()["preemptions"] > 0
    for ids, answer in zip(tokens, written, strict=True):
        assert_greedy(judge, ids, answer)
