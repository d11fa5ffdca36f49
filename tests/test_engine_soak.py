"""The whole engine under a crowd: 200 requests over the demo model with room for a few of them. See engine_soak.py."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_soak import LONGEST, Job, Soak, Told, make_jobs, quiet

from inferfleet.engine.offline import LLM
from inferfleet.engine.philox import uniforms
from inferfleet.engine.sampling_params import SamplingParams

DEMO = Path(__file__).resolve().parent.parent / "ops" / "demo_model"


def engine_of(**settings):
    defaults = {"dtype": "float32", "device": "cpu", "max_model_len": LONGEST, "threads": 1}
    return LLM(str(DEMO), **{**defaults, **settings}).engine


@pytest.fixture(scope="module")
def undisturbed():
    """The jobs of a seed and what each writes undisturbed, once."""
    roomy = {"max_num_seqs": 400, "max_num_batched_tokens": 8192, "kv_cache_tokens": 400 * LONGEST}
    engine = engine_of(**roomy, prefix_caching=False)
    known = {}

    def get(seed: int):
        if seed not in known:
            jobs = make_jobs(seed, engine.admission.vocab_size)
            known[seed] = jobs, quiet(engine, jobs)
        return known[seed]

    return get


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_crowd_on_a_small_engine_ends_leaves_nothing_and_shows_in_no_text(seed, undisturbed):
    # Given 200 mixed requests, and an engine with six seats, 24 tokens a step and blocks for two long ones,
    jobs, texts = undisturbed(seed)
    engine = engine_of(max_num_seqs=6, max_num_batched_tokens=24, block_size=8, kv_cache_tokens=2 * LONGEST)
    for tensor in chain.from_iterable(engine.builder.cache.blocks.values()):
        tensor.fill_(float("nan"))  # nothing that was never written may be read
    # when they come at any time, some are cancelled, some go on after a restart, and two steps fail,
    outcomes = Soak(engine, jobs, texts, faults=frozenset({40, 300})).run()
    # then each has ended and all texts are those of quiet runs (see soak.py),
    assert outcomes.total() == len(jobs)
    # in a run where everything that can happen did.
    assert min(outcomes["finished"] - 100, outcomes["cancelled"], outcomes["failed"]) > 0
    assert min(engine.scheduler.num_preemptions, engine.scheduler.blocks.prefix_hits) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1, "kv_cache_tokens": LONGEST},
        {"max_num_seqs": 16, "max_num_batched_tokens": 5, "kv_cache_tokens": 2 * LONGEST, "block_size": 3},
        {"max_num_seqs": 4, "paged_attn": False, "kv_cache_tokens": 4 * LONGEST},
        {"max_num_seqs": 64, "max_num_batched_tokens": 512, "kv_cache_tokens": 64 * LONGEST},
    ],
)
def test_no_setting_of_the_engine_shows_in_a_text(settings, undisturbed):
    jobs, texts = undisturbed(0)
    outcomes = Soak(engine_of(**settings), jobs, texts).run()
    assert outcomes["failed"] == 0
    assert outcomes.total() == len(jobs)


def common_with_an_edge(told: int, shift: float) -> int:
    """Of one token each: the quiet run picked 0 a hair before the edge between 0 and 1, the crowd told `told`.

    shift: how far the crowd's logits lie on the side of 0.
    """
    job = Job("job-7", [5], SamplingParams(seed=7), "", 0, 0, None, None)
    (drawn,) = uniforms(*np.array([[7], [0], [0]], dtype=np.uint64))
    edge = math.log(drawn / (1 - drawn))
    alone = Told([0], ["a"], [torch.tensor([edge + 1e-5, 0.0])], "a", "length")
    seen = {(7, 0, 0): torch.tensor([edge + shift, 0.0])}
    return Soak(None, [job], {job.id: [alone]})._same(job, 0, [told], seen)


def test_a_pick_on_an_edge_may_fall_to_its_other_side():
    assert common_with_an_edge(told=0, shift=2e-5) == 1
    assert common_with_an_edge(told=1, shift=-1e-5) == 0


@pytest.mark.parametrize(("told", "shift"), [(1, 1e-5), (1, -1e-2), (0, 1e-2)])
def test_a_crowd_shows_in_a_token_that_its_logits_do_not_give_and_in_logits_that_differ_by_more_than_rounding(
    told, shift
):
    with pytest.raises(AssertionError, match="job-7"):
        common_with_an_edge(told, shift)
