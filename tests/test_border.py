"""Models with a border: who is computed by which variant, and what happens to a request that grows across."""

from __future__ import annotations

import random

import pytest
from paper_engine import PaperEngine, cold_tokens, make_blocks, make_request
from tiny_engine import greedy, run, tiny_engine

from inferfleet.engine.border import Border
from inferfleet.engine.request import Status

BORDER = Border(20, within="short", beyond="long")


def engine_of(*groups, **fields):
    return PaperEngine(make_blocks(*(groups or [(None, 100)])), border=BORDER, **fields)


@pytest.mark.parametrize(("known", "variant"), [(1, "short"), (20, "short"), (21, "long"), (60, "long")])
def test_the_tokens_known_when_a_request_comes_choose_its_variant(known, variant):
    engine = engine_of()
    request = make_request("a", [1] * known, max_tokens=1)
    engine.add(request)
    assert request.variant == variant
    engine.run()
    assert request.output_token_ids == cold_tokens(request, [None], BORDER)


def test_published_tokens_count_for_the_variant():
    # Given a prompt within the border whose published answer lies beyond it,
    whole = cold_tokens(make_request("cold", [1] * 15, max_tokens=12), [None], BORDER)
    engine = engine_of()
    resumed = make_request("a", [1] * 15, max_tokens=12, output=whole[:9])
    # when it goes on, then it is the long variant's from its first step, and writes what it would have written.
    engine.add(resumed)
    assert resumed.variant == "long"
    engine.run()
    assert resumed.output_token_ids == whole


def test_a_request_that_grows_across_the_border_is_computed_again_and_once():
    # Given a prompt of 18 tokens and a border at 20,
    engine = engine_of(max_num_batched_tokens=64)
    request = make_request("a", [1] * 18, max_tokens=8)
    engine.add(request)
    # when it writes, then the step after its 21st token computes all 21 again, and every other step one.
    engine.run()
    assert [plan.num_tokens for plan in engine.batches] == [[18], [1], [1], [21], [1], [1], [1], [1]]
    assert request.output_token_ids == cold_tokens(request, [None], BORDER)
    # And it was no preemption: nobody took its blocks.
    assert request.num_preemptions == engine.scheduler.num_preemptions == 0


def test_an_answer_that_ends_on_the_last_token_within_is_not_computed_again():
    engine = engine_of(max_num_batched_tokens=64)
    engine.add(make_request("a", [1] * 18, max_tokens=3))
    engine.run()
    assert [plan.num_tokens for plan in engine.batches] == [[18], [1], [1]]


def test_prefixes_are_found_only_by_their_own_variant():
    # Given a long prompt that has run,
    engine = engine_of()
    shared = [token % 5 for token in range(16)]
    engine.add(make_request("long", [*shared, *[7] * 10], max_tokens=1))
    engine.run()
    # when a short one with the same beginning comes, twice, and then another long one,
    for name, tail, cached in (("short", 2, 0), ("again", 2, 16), ("longer", 9, 16)):
        request = make_request(name, [*shared, *[8] * tail], max_tokens=1, arrival=len(engine.finished))
        engine.add(request)
        engine.run()
        # then each finds what its own variant has computed, and nothing else.
        assert request.num_cached_tokens == cached, name
        assert request.output_token_ids == cold_tokens(request, [None], BORDER)


def test_answers_of_one_prompt_share_it_within_the_border_and_find_each_others_blocks_beyond():
    engine = engine_of(max_num_batched_tokens=64)
    answers = [make_request("job", [1] * 20, max_tokens=6, index=index) for index in range(3)]
    engine.add(*answers)
    engine.run()
    # Then the others start within the border, on the blocks of the first, which has crossed by then,
    assert [answer.num_cached_tokens for answer in answers] == [0, 16, 16]
    assert all(answer.output_token_ids == cold_tokens(answer, [None], BORDER) for answer in answers)
    # and when they cross, they find what it has computed beyond: one token each is left to compute.
    assert [plan.num_tokens for plan in engine.batches][:3] == [[20], [21, 4, 4], [1, 1, 1]]


def test_a_request_may_be_cancelled_between_its_crossing_and_its_next_step():
    engine = engine_of(max_num_batched_tokens=64)
    request, other = make_request("a", [1] * 20, max_tokens=6), make_request("b", [2] * 3, arrival=1)
    engine.add(request)
    engine.add(other)
    engine.step()
    assert request.status is Status.WAITING and request.variant == "long"
    engine.scheduler.finish(request, "cancelled")
    engine.run()
    assert len(request.output_token_ids) == 1
    assert other.output_token_ids == cold_tokens(other, [None], BORDER)


@pytest.mark.parametrize("seed", range(30))
def test_crossing_under_pressure_shows_in_nobodys_text(seed):
    # Given few blocks, full and windowed, few seats, and requests on both sides of the border and across,
    chosen = random.Random(seed)
    bounds = [None, 6] if seed % 2 else [None]
    engine = engine_of(
        *((bound, chosen.randrange(14, 24)) for bound in bounds),
        max_num_seqs=chosen.randrange(1, 6),
        max_num_batched_tokens=chosen.randrange(1, 24),
    )
    prompts = [[chosen.randrange(3) for _ in range(30)] for _ in range(3)]
    requests = []
    for number in range(chosen.randrange(4, 12)):
        prompt = chosen.choice(prompts)[: chosen.randrange(1, 31)]
        request = make_request(f"{number}", prompt, max_tokens=chosen.randrange(1, 18), arrival=number)
        requests.append(request)
    # when they come at any time,
    for request in requests:
        engine.add(request)
        for _ in range(chosen.randrange(4)):
            if engine.scheduler.has_work:
                engine.step()
    engine.run()
    # then each writes what it would write alone, over the whole text, at every token.
    for request in requests:
        assert request.output_token_ids == cold_tokens(request, bounds, BORDER)
    assert all(pool.num_free == pool.num_usable for pool in engine.blocks.pools)


def test_a_stop_string_may_end_an_answer_in_the_very_step_that_crosses(tmp_path):
    # Given an answer of a model with a border, and where its first token takes it across,
    quiet = tiny_engine(tmp_path)
    quiet.scheduler.border = BORDER
    quiet.add("a", [5] * 20, greedy(4))
    text = run(quiet)["a"][0]["text"]
    assert text
    engine = tiny_engine(tmp_path)
    engine.scheduler.border = BORDER
    # when its first character is a stop string,
    engine.add("a", [5] * 20, greedy(4, stop=(text[0],)))
    answers = run(engine)
    # then it ends there, and nothing is left behind.
    assert answers["a"][0]["finish_reason"] == "stop"
    assert engine.scheduler.blocks.usage == 0
