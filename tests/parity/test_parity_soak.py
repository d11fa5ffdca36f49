"""The crowd of soak.py over every architecture: whatever its layers keep, nothing of it may leak or show in a text."""

from __future__ import annotations

from itertools import chain

import pytest
from engine_soak import LONGEST, Soak, make_jobs, quiet
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.phimoe import BORDER
from parity.checkpoints.writing import write
from parity.device import DEVICE

from inferfleet.engine.offline import LLM

ROOMY = {"max_num_seqs": 400, "max_num_batched_tokens": 8192, "kv_cache_tokens": 400 * LONGEST, "prefix_caching": False}
SMALL = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "block_size": 8, "kv_cache_tokens": 2 * LONGEST}


def engine_of(folder, settings):
    return LLM(str(folder), dtype="float32", device=str(DEVICE), max_model_len=LONGEST, threads=1, **settings).engine


def soak(folder, noise: float) -> None:
    roomy = engine_of(folder, ROOMY)
    jobs = make_jobs(1, roomy.admission.vocab_size)
    texts = quiet(roomy, jobs)
    small = engine_of(folder, SMALL)
    for tensor in chain.from_iterable(small.builder.cache.blocks.values()):
        tensor.fill_(float("nan"))  # nothing that was never written may be read
    outcomes = Soak(small, jobs, texts, faults=frozenset({50, 400}), noise=noise).run()
    assert outcomes.total() == len(jobs)
    assert min(outcomes["finished"] - 100, outcomes["cancelled"], outcomes["failed"]) > 0
    assert small.scheduler.blocks.prefix_hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [0, 1, 2])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_crowd_shows_in_no_text_of_any_family(name, shape, reference):
    # Given 200 mixed requests to a random model of the family, and an engine that is too small for them,
    # when they come at any time, some are cancelled, some go on after a restart, and two steps fail,
    # then each ends, all texts are those of quiet runs, and nothing is left behind.
    judge = reference(name, shape)
    soak(judge.folder, judge.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_crowd_on_both_sides_of_a_rotary_border_shows_in_no_text(seed, tmp_path):
    # As above, with answers that grow across the original length of LongRoPE.
    soak(tmp_path, write(BORDER, seed, tmp_path).tolerance)
