"""Decoding steps in rounded sizes, as recorded graphs need them; on a CPU without the graph."""

import random

import pytest
import torch
from tiny_engine import VOCAB, greedy, run, seeded, tiny_engine

from inferfleet.engine import replay
from inferfleet.engine.replay import Replay, rounded_blocks, rounded_rows


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


@pytest.mark.gpu
def test_a_graph_gives_what_the_step_gives_and_is_recorded_once_for_each_size():
    # Given a model of one attention layer on a GPU,
    from parity.checkpoints.writing import Reference  # noqa: F401  (the parity folder is on the path)
