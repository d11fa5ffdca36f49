"""Decoding steps in rounded sizes, as recorded graphs need them; on a CPU without the graph."""

import random
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from small_checkpoint import checkpoint
from tiny_engine import VOCAB, greedy, run, seeded, tiny_engine

from inferfleet.engine import replay
from inferfleet.engine.errors import OutOfMemory
from inferfleet.engine.group import ALONE
from inferfleet.engine.loader import EngineSpec, _can_replay
from inferfleet.engine.offline import LLM
from inferfleet.engine.replay import Recorded, Replay, rounded_blocks, rounded_rows
from inferfleet.kernels import on_cuda


class Rehearsal(Replay):
    """Computes what a graph would replay, and remembers the sizes."""

    def __init__(self, model) -> None:
        self._model = model
        self.shapes: list[tuple[int, int]] = []

    def hidden(self, batch):
        self.shapes.append((batch.num_tokens, batch.block_tables[0].shape[1]))
        return self._model.forward(batch.input_ids, batch.positions, batch)


def prompts(lengths):
    chosen = random.Random(3)
    return [[chosen.randrange(VOCAB - 4) for _ in range(length)] for length in lengths]


def answers(engine, max_tokens=20):
    for number, ids in enumerate(prompts([1, 3, 9, 40, 17, 8])):
        sampling = greedy(max_tokens + number) if number % 2 else seeded(number, max_tokens + number)
        engine.add(str(number), ids, sampling)
    return {name: found[0]["token_ids"] for name, found in run(engine).items()}


def test_steps_filled_up_to_rounded_sizes_give_what_steps_of_their_own_size_give(tmp_path, monkeypatch):
    # Given an engine that computes decoding steps in rounded sizes, over a cache that is NaN where nobody wrote,
    monkeypatch.setattr(replay, "MIN_BLOCKS", 4)
    engine = tiny_engine(tmp_path)
    engine.replay = Rehearsal(engine.model)
    # when rows of unlike lengths decode together and end one after another,
    filled_up = answers(engine)
    # then every answer is the one of an engine without it, and few sizes have come up.
    assert filled_up == answers(tiny_engine(tmp_path))
    rows = {rows for rows, _ in engine.replay.shapes}
    assert rows == {8, 4, 2, 1}
    assert {width for _, width in engine.replay.shapes} <= {4, 8, 16}


def test_a_step_that_computes_part_of_a_prompt_is_not_filled_up(tmp_path):
    # Given an engine that takes four tokens a step, when a prompt of nine comes,
    engine = tiny_engine(tmp_path, max_num_batched_tokens=4)
    engine.replay = Rehearsal(engine.model)
    engine.add("a", prompts([9])[0], greedy(3))
    run(engine)
    # then its chunks of four go their own way, and its last token and two of the answer are steps that decode.
    assert len(engine.replay.shapes) == 3


def test_scores_are_computed_without_it(tmp_path):
    engine = tiny_engine(tmp_path)
    engine.replay = Rehearsal(engine.model)

    logits = engine.score([5], num_decoded=2)

    assert engine.replay.shapes == []
    assert logits.isfinite().all()


def test_sizes_are_rounded_up_and_never_beyond_what_an_engine_has(tmp_path):
    assert [rounded_rows(count) for count in (1, 2, 3, 4, 5, 9, 64, 65, 100)] == [1, 2, 4, 4, 8, 16, 64, 96, 128]
    assert [rounded_blocks(count) for count in (1, 32, 33, 100)] == [32, 32, 64, 128]
    # Given an engine for five rows and contexts of six blocks, when five rows decode, then neither is exceeded.
    engine = tiny_engine(tmp_path, max_num_seqs=5, max_model_len=24)
    engine.replay = Rehearsal(engine.model)
    for number, ids in enumerate(prompts([3, 4, 5, 6, 7])):
        engine.add(str(number), ids, greedy(8))
    run(engine)
    assert set(engine.replay.shapes) == {(5, 6)}


class Counted(Replay):
    """Records nothing, and remembers what it would have recorded."""

    def __init__(self) -> None:
        self._recorded = OrderedDict()
        self.made: list[int] = []

    def _record(self, batch):
        self.made.append(batch.num_tokens)
        return Recorded(SimpleNamespace(replay=lambda: None), torch.tensor(batch.num_tokens))


def test_the_graph_that_waited_longest_makes_room_and_is_recorded_again_when_it_is_needed(monkeypatch):
    # Given room for two graphs, when steps of three sizes take turns,
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    counted = Counted()
    asked = [1, 2, 1, 8, 1, 2]
    batches = [SimpleNamespace(num_tokens=rows, block_tables=[torch.zeros(rows, 32)]) for rows in asked]
    given = [int(counted.hidden(batch)) for batch in batches]
    # then each step has the graph of its size, and the one of two rows, which made room, is made again.
    assert given == asked
    assert counted.made == [1, 2, 8, 2]


@pytest.mark.parametrize("has_triton", [True, False])
def test_steps_are_recorded_only_where_the_kernels_run(monkeypatch, has_triton):
    monkeypatch.setattr(on_cuda, "has_triton", lambda: has_triton)
    loaded = SimpleNamespace(device=torch.device("cuda"), group=ALONE, model=SimpleNamespace(can_replay=True))
    assert _can_replay(loaded, EngineSpec(path="")) is has_triton


def on_gpu(folder, **settings):
    defaults = {"dtype": "float32", "device": "cuda", "max_model_len": 512, "kv_cache_tokens": 8192}
    return LLM(str(folder), **{**defaults, **settings})


@pytest.mark.gpu
def test_recorded_steps_on_a_gpu_write_what_others_write_and_are_recorded_once_a_size(tmp_path):
    # Given a model on a GPU, once with recorded steps and once without,
    checkpoint(tmp_path)
    recording, plain = on_gpu(tmp_path), on_gpu(tmp_path)
    plain.engine.replay = None
    given = [{"prompt_token_ids": [token % 200 for token in ids]} for ids in prompts([1, 5, 30, 300, 77])]
    # when both answer the same prompts twice,
    texts = [
        [output.outputs[0].token_ids for output in llm.generate(given, greedy(40))]
        for llm in (recording, plain, recording)
    ]
    # then the texts are the same, and there is one graph for each size.
    assert texts[0] == texts[1] == texts[2]
    assert set(recording.engine.replay._recorded) == {(8, 32)}


@pytest.mark.gpu
def test_a_step_that_a_gpu_has_no_memory_for_fails_its_request_and_the_next_one_is_answered(tmp_path, monkeypatch):
    # Given a model on a GPU whose next step asks for more memory than there is,
    checkpoint(tmp_path)
    llm = on_gpu(tmp_path)
    forward = llm.engine.model.forward

    def greedy_forward(*step):
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
        return forward(*step)

    monkeypatch.setattr(llm.engine.model, "forward", greedy_forward)
    # when a request comes, then it is told why it failed,
    with pytest.raises(OutOfMemory):
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], greedy(4))
    # and the engine goes on.
    monkeypatch.undo()
    assert len(llm.generate([{"prompt_token_ids": [1, 2, 3]}], greedy(4))[0].outputs[0].token_ids) == 4
