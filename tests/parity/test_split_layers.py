"""Every family split over ranks, each with its share of heads, widths and vocabulary, against transformers.

The ranks are threads here; test_tensor_parallel.py runs processes.
"""

from __future__ import annotations

import random

import pytest
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import Reference
from parity.device import CPU
from parity.direct import Direct
from parity.threads_as_ranks import load_split, on_every_rank

from inferfleet.engine.config import read_config
from inferfleet.engine.errors import LoadError
from inferfleet.engine.families import find_family
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.models.qwen3 import Qwen3ForCausalLM

NAMES = list(ARCHITECTURES)
SLOW = pytest.mark.slow
#: What a logit may differ by in any family's parity tests: some prompts here are harder than those of the others.
BAR = 3e-4


def prompts(judge: Reference, lengths: list[int]) -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(judge.vocab_size) for _ in range(length)] for length in lengths]


def can_split(judge: Reference) -> bool:
    return find_family(read_config(judge.folder).architecture)[1].can_split


def worst_difference(judge: Reference, size: int, lengths: list[int], paged: bool = True) -> float:
    """Over all ranks: each of them has the whole logits."""
    models, tokens = load_split(judge.folder, size), prompts(judge, lengths)
    found = on_every_rank(size, lambda rank: Direct(models[rank], paged=paged, device=CPU).score(tokens, 16))
    return max(
        float((ours - judge.logits(ids)).abs().max())
        for scores in found
        for ours, ids in zip(scores, tokens, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_references_logits(name, reference):
    # Given a checkpoint of an odd vocabulary, when each rank loads its share and both compute prompts in chunks,
    judge = reference(name, 0)
    if not can_split(judge):
        pytest.skip("this family says that it cannot be split")
    # then the sums over the ranks are what one rank computes.
    assert worst_difference(judge, 2, [1, 17, 40]) <= judge.tolerance


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in NAMES])
def test_any_number_of_ranks_gives_the_references_logits_or_says_which_would(name, seed, size, paged, reference):
    judge = reference(name, seed)
    if not can_split(judge):
        pytest.skip("this family says that it cannot be split")
    try:
        worst = worst_difference(judge, size, [1, 2, 33, 90, 17], paged)
    except LoadError as error:
        assert error.param == "tensor_parallel_size"
        assert str(size) not in error.message.partition("that works with ")[2].split(", ")
    else:
        assert worst <= max(judge.tolerance, BAR)


def test_a_family_whose_layers_take_no_shares_refuses(reference, monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "can_split", False)
    with pytest.raises(UnsupportedModel, match="Qwen3ForCausalLM cannot be split"):
        load_split(reference("qwen3", 0).folder, 2)


def test_a_bias_behind_a_sum_is_added_once(reference):
    # Given attention with biases, on the output projection too, and 8 query heads that share one key/value head,
    judge = reference("qwen3", 1)
    # when 4 ranks add their parts up, then the bias is there once, and every rank has the one key/value head.
    assert worst_difference(judge, 4, [1, 30]) <= judge.tolerance
    specs = [model.cache_spec.layers for model in load_split(judge.folder, 4)]
    assert {layer.num_kv_heads for layers in specs for layer in layers} == {1}


def test_the_ranks_hold_every_matrix_once_between_them(reference, load):
    # Given a model whose key/value heads come out even, when two ranks load it,
    judge = reference("qwen3", 0)
    shares = [_matrix_sizes(model) for model in load_split(judge.folder, 2)]
    # then each has half of every matrix, and a half of the cache's heads.
    assert shares[0] == shares[1]
    assert [2 * size for size in shares[0]] == _matrix_sizes(load(judge.folder))
    halves = [model.cache_spec.layers[0].num_kv_heads for model in load_split(judge.folder, 2)]
    assert [2 * half for half in halves] == [load(judge.folder).cache_spec.layers[0].num_kv_heads] * 2


def _matrix_sizes(model) -> list[int]:
    products = [module._product for module in model.modules() if isinstance(module, Linear)]
    return [product.in_features * product.out_features for product in products]


@pytest.mark.parametrize(
    ("seed", "size", "sizes"),
    [(0, 8, "that works with 1, 2, 4"), (2, 2, "that works with 1, 3, 6"), (2, 4, "that works with 1, 3, 6")],
)
def test_heads_that_do_not_come_out_are_refused_with_the_sizes_that_do(seed, size, sizes, reference):
    with pytest.raises(LoadError, match=sizes) as refused:
        load_split(reference("qwen3", seed).folder, size)
    assert refused.value.param == "tensor_parallel_size"
    assert "num_attention_heads" in refused.value.message
