"""Every logit at every position against transformers, on batches whose chunks and block tables the tests choose."""

from __future__ import annotations

import random

import pytest
import torch
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import write
from parity.direct import Direct
from safetensors.torch import load_file, save_file

from inferfleet.engine.families import load_model
from inferfleet.engine.model_errors import WeightsMismatch

NAMES = list(ARCHITECTURES)
SEEDS = range(6)
#: (block size, or None for the contiguous cache; tokens of a row per step)
CACHES = [(16, 16), (8, 5), (32, 1000), (16, 1), (None, 16)]


def prompts(vocab_size: int, seed: int, count: int) -> list[list[int]]:
    """Ragged prompts: one token, around the windows (7..33) and chunks, and several windows long."""
    chosen = random.Random(seed)
    lengths = [1, 2, 7, 15, 16, 17, 33, 64, 90, 128]
    lengths += [chosen.randrange(3, 130) for _ in range(count)]
    return [[chosen.randrange(vocab_size) for _ in range(length)] for length in lengths[:count]]


def matrix():
    """The first shape of each architecture always; the other shapes, seeds and caches in the long run."""
    for name in NAMES:
        for seed in SEEDS:
            for block_size, chunk in CACHES:
                sample = seed == 0 and (block_size, chunk) == CACHES[NAMES.index(name) % len(CACHES)]
                marks = () if sample else pytest.mark.slow
                yield pytest.param(name, seed, block_size, chunk, marks=marks)


@pytest.mark.parametrize(("name", "seed", "block_size", "chunk"), list(matrix()))
def test_logits_equal_the_reference_at_every_position_of_a_ragged_batch(name, seed, block_size, chunk, reference, load):
    # Given a random checkpoint and 16 prompts of unlike lengths,
    judge = reference(name, seed)
    tokens = prompts(judge.vocab_size, seed, 16)
    # when they are computed together, in chunks, over a cache whose blocks lie in random order,
    cache = Direct(load(judge.folder), block_size=block_size or 16, paged=block_size is not None)
    scores = cache.score(tokens, chunk)
    # then every logit is the reference's.
    worst = max(float((ours - judge.logits(ids)).abs().max()) for ours, ids in zip(scores, tokens, strict=True))
    assert worst <= judge.tolerance


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_gives_the_same_logits_alone_as_among_others(name, reference, load):
    # Given a prompt longer than the window, and fifteen others,
    judge = reference(name, 0)
    tokens = prompts(judge.vocab_size, 3, 16)
    alone = Direct(load(judge.folder)).score([tokens[8]], 16)[0]
    # when it runs among them,
    among = Direct(load(judge.folder)).score(tokens, 16)[8]
    # then nothing but rounding differs.
    assert float((alone - among).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_sample_get_the_same_logits_when_only_those_are_wanted(name, reference, load):
    # Given a step of a decode, a chunk that ends its prompt, one that does not, and another decode,
    judge = reference(name, 0)
    tokens = prompts(judge.vocab_size, 4, 4)
    cache = Direct(load(judge.folder))
    rows = [cache.request(slot, ids * 40) for slot, ids in enumerate(tokens)]
    cache.step([(rows[0], 30), (rows[1], 9), (rows[3], 11)])
    step, samples = [(rows[0], 1), (rows[1], 20), (rows[2], 16), (rows[3], 1)], [True, True, False, True]
    # when logits are asked for where a token is picked,
    picked = cache.step(step, samples)
    # then they are the reference's, though upper layers that store nothing saw no other token.
    for row, logits in zip([row for row, wanted in zip(rows, samples, strict=True) if wanted], picked, strict=True):
        expected = judge.logits(row.token_ids[: row.num_computed_tokens])[-1]
        assert float((logits - expected).abs().max()) <= judge.tolerance
    # And a step that picks nothing gives nothing, and leaves what the next one needs.
    assert cache.step([(rows[2], 7)], [False]) == []
    last = cache.step([(rows[2], 1)], [True])[0]
    expected = judge.logits(rows[2].token_ids[: rows[2].num_computed_tokens])[-1]
    assert float((last - expected).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("layout", ["saved", "hub", "stacked"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_a_checkpoint_loads_to_the_same_model(name, layout, reference, load):
    # Given one model written as transformers saves it, as the hub holds it, or with stacked experts, in three shards,
    judge = reference(name, 1, layout=layout, shards=3)
    ids = prompts(judge.vocab_size, 5, 7)[6]
    # when it is loaded, then it scores as the reference does.
    scores = Direct(load(judge.folder)).score([ids], 16)[0]
    assert float((scores - judge.logits(ids)).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-31b", "gemma4-26b-a4b"])
def test_a_media_placeholder_in_a_text_prompt_reads_as_in_the_reference(name, reference, load):
    # Given a multimodal checkpoint, whose image, audio and video placeholders are 270 to 272,
    judge = reference(name, {"gemma4-e2b": 1}.get(name, 0))
    ids = [5, 270, 9, 271, 272, 30, 270]
    # when a prompt holds them without any media, then the logits are the reference's, which embeds padding there.
    scores = Direct(load(judge.folder)).score([ids], 16)[0]
    assert float((scores - judge.logits(ids)).abs().max()) <= judge.tolerance


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_finite_and_as_close_to_float32_as_the_reference_in_bfloat16(name, reference, load):
    # Given one checkpoint in both dtypes, here and there,
    judge = reference(name, 0)
    tokens = prompts(judge.vocab_size, 7, 10)
    exact = torch.cat([judge.logits(ids) for ids in tokens])
    theirs = torch.cat([judge.in_dtype(torch.bfloat16).logits(ids) for ids in tokens])
    # when the same prompts run in bfloat16, weights and cache,
    ours = torch.cat(Direct(load(judge.folder, "bfloat16"), dtype=torch.bfloat16).score(tokens, 16))
    # then every logit is finite and the distributions are near.
    assert ours.dtype == torch.float32 and bool(ours.isfinite().all())
    assert kl(exact, ours) < min(ARCHITECTURES[name].bfloat16_kl, 2 * kl(exact, theirs))


def kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(exact || other) over rows of logits, in nats."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_told_with_every_tensor_that_is_wrong(name, tmp_path):
    # Given a checkpoint of which one tensor is gone, one has a stranger's name and one another shape,
    write(name, 0, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone, renamed, reshaped = (
        next(name for name in tensors if name.endswith(end))
        for end in (
            "layers.0.post_attention_layernorm.weight",
            "layers.1.input_layernorm.weight",
            "embed_tokens.weight",
        )
    )
    del tensors[gone]
    tensors["model.stranger"] = tensors.pop(renamed)
    tensors[reshaped] = tensors[reshaped][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    # when it is loaded, then one error names all of it, and nothing else.
    with pytest.raises(WeightsMismatch) as caught:
        load_model(str(tmp_path), device="cpu")
    assert set(caught.value.missing) == {gone, renamed}
    assert caught.value.extra == ("model.stranger",)
    assert [text.partition(" ")[0] for text in caught.value.misshapen] == [reshaped]


def test_a_bfloat16_checkpoint_in_shards_runs_in_float32(reference, load):
    # Given a checkpoint that was rounded to bfloat16 when it was written, in four files,
    judge = reference("qwen3-moe", 0, dtype=torch.bfloat16, shards=4)
    ids = prompts(judge.vocab_size, 5, 9)[8]
    # when it is loaded as float32, then it scores as the rounded reference does in float32.
    scores = Direct(load(judge.folder)).score([ids], 16)[0]
    assert float((scores - judge.logits(ids)).abs().max()) <= judge.tolerance
