"""A model split over processes writes what it writes in one: two real ranks behind the whole offline engine."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time

import psutil
import pytest
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import Reference
from parity.test_quantized_load import with_decoded_weights
from parity.test_split_layers import can_split

from inferfleet.engine import ranks
from inferfleet.engine.errors import GroupBroken, LoadError
from inferfleet.engine.followers import Followers
from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
SAMPLE = ("qwen3", "gemma4-e2b")
NAMES = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in ARCHITECTURES]
#: Blocks of 8 and chunks of 32; the cache holds the beginnings of all answers and not their ends.
TIGHT = {"block_size": 8, "max_num_batched_tokens": 32, "max_num_seqs": 8, "max_model_len": 200, "kv_cache_tokens": 200}


def llm(judge: Reference, size: int, **settings) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "threads": 1, "max_model_len": 256, "kv_cache_tokens": 4096}
    return LLM(judge.folder, tensor_parallel_size=size, **{**defaults, **settings})


def prompts(judge: Reference, lengths: list[int]) -> list[list[int]]:
    chosen = random.Random(5)
    return [[chosen.randrange(judge.vocab_size) for _ in range(length)] for length in lengths]


def generate(engine: LLM, tokens: list[list[int]], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in tokens], sampling)
    return [output.outputs[0].token_ids for output in outputs]


def assert_same_up_to_noise(judge: Reference, ids: list[int], ours: list[int], theirs: list[int]) -> None:
    """Equal up to the first place where the reference itself is undecided."""
    differing = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if differing is not None:
        best = judge.logits(ids + theirs)[len(ids) - 1 + differing].topk(2).values
        assert float(best[0] - best[1]) <= 2 * judge.tolerance, f"token {differing} differs"


@pytest.fixture
def pair(reference):
    """pair(name): (judge, a model split over two processes); they are gone afterwards."""
    engines: list[LLM] = []

    def start(name: str, seed: int = 0, **settings) -> tuple[Reference, LLM]:
        judge = reference(name, seed)
        if not can_split(judge):
            pytest.skip("this family says that it cannot be split")
        engines.append(llm(judge, 2, **settings))
        return judge, engines[-1]

    yield start
    pids = [pid for engine in engines for pid in engine._loaded.followers.pids]
    for engine in engines:
        engine.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_write_what_one_writes_batched_preempted_and_after_a_prefix_hit(name, pair):
    # Given a cache too small for all answers, and prompts of several chunks, two of them with a common beginning,
    judge, split = pair(name, **TIGHT)
    one = llm(judge, 1, **TIGHT)
    tokens = prompts(judge, [45, 6, 33, 21])
    tokens.append(tokens[0] + tokens[1])
    # when they run in two processes, and then once more over what the prefix cache has,
    first, again, alone = generate(split, tokens), generate(split, tokens), generate(one, tokens)
    # then the texts are those of one process, and the logits those of the reference.
    assert split.engine.stats()["preemptions"] and split.engine.stats()["prefix_hits"]
    for ids, ours, ours_again, theirs in zip(tokens, first, again, alone, strict=True):
        assert_same_up_to_noise(judge, ids, ours, theirs)
        assert_same_up_to_noise(judge, ids, ours_again, theirs)
    assert float((split.score(tokens[-1]) - judge.logits(tokens[-1])).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("name", ["qwen3", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_both_processes_quantise_what_they_hold(name, pair, tmp_path):
    # Given the reference with the weights that the codes of two ranks mean, when two processes quantise the checkpoint,
    judge, split = pair(name, quantization="int8")
    exact = with_decoded_weights(judge, "int8", tmp_path, ranks=2)
    tokens = prompts(judge, [45, 6, 33])
    # then they have that reference's logits and write its greedy texts.
    for ids, ours in zip(tokens, generate(split, tokens), strict=True):
        assert float((split.score(ids) - exact.logits(ids)).abs().max()) <= 3 * judge.tolerance
        assert_same_up_to_noise(exact, ids, ours, exact.greedy(ids, len(ours))[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_other_shapes_and_the_contiguous_cache_write_the_same(name, seed, pair):
    try:
        judge, split = pair(name, seed, paged_attn=False, max_num_batched_tokens=32)
    except LoadError as error:
        assert error.param == "tensor_parallel_size"
        return
    tokens = prompts(judge, [45, 1, 33, 90])
    for ids, ours, theirs in zip(tokens, generate(split, tokens), generate(llm(judge, 1), tokens), strict=True):
        assert_same_up_to_noise(judge, ids, ours, theirs)


def test_sampled_answers_are_those_of_one_process_also_after_a_cancelled_one(pair):
    judge, split = pair("qwen3")
    tokens, drawn = prompts(judge, [9, 30]), SamplingParams(seed=7, n=2, max_tokens=24, ignore_eos=True)
    split.engine.add("cancelled", tokens[1], GREEDY)
    for _ in range(3):
        split.engine.step()
    split.engine.cancel("cancelled")
    split.engine.step()
    ours = split.generate([{"prompt_token_ids": ids} for ids in tokens], drawn)
    theirs = llm(judge, 1).generate([{"prompt_token_ids": ids} for ids in tokens], drawn)
    assert [[a.token_ids for a in one.outputs] for one in ours] == [
        [a.token_ids for a in one.outputs] for one in theirs
    ]


@pytest.mark.parametrize("size", [0, 3])
def test_a_size_that_does_not_suit_the_model_is_refused_and_leaves_no_process(size, reference):
    before = psutil.Process().children(recursive=True)
    with pytest.raises(LoadError) as refused:
        llm(reference("qwen3", 0), size)
    assert refused.value.param == "tensor_parallel_size"
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_what_a_follower_could_not_load_is_told(reference, monkeypatch):
    # Given followers that are told of another folder than rank 0,
    load = Followers.load
    monkeypatch.setattr(Followers, "load", lambda self, path, *rest: load(self, path + "/nothing", *rest))
    # when one of them finds nothing there, then the error is its own.
    with pytest.raises(LoadError, match=r"rank 1 of 2: .*nothing"):
        llm(reference("qwen3", 0), 2)


def test_a_killed_follower_breaks_the_engine_in_the_middle_of_work_and_for_good(pair):
    # Given an answer under way,
    judge, split = pair("qwen3", max_model_len=4096, kv_cache_tokens=8192)
    (pid,) = split._loaded.followers.pids
    killer = threading.Timer(0.3, os.kill, [pid, signal.SIGKILL])
    killer.start()
    # when the other rank dies, then it is told who is gone and how, at once and at every later try.
    ids = prompts(judge, [9])
    with pytest.raises(GroupBroken, match=rf"rank 1 \(process {pid}\) was ended by SIGKILL"):
        generate(split, ids, ENDLESS)
    with pytest.raises(GroupBroken, match="rank 1"):
        generate(split, ids)


def test_a_follower_that_hangs_breaks_the_engine_after_the_time_that_is_allowed(pair, monkeypatch):
    monkeypatch.setattr(ranks, "COLLECTIVE_SECONDS", 1.5)
    judge, split = pair("qwen3")
    (pid,) = split._loaded.followers.pids
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(GroupBroken):
        generate(split, prompts(judge, [9]))
    assert time.monotonic() - begin < 10
    # It is stopped and reads no end of a wire: the fixture finds it gone all the same.


def test_the_processes_end_with_the_object(reference):
    engine = llm(reference("qwen3", 0), 2)
    (pid,) = engine._loaded.followers.pids
    assert psutil.pid_exists(pid)
    del engine
    gc.collect()
    assert not psutil.pid_exists(pid)
