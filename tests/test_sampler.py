"""Picks are right (against transformers' processors and the distribution), and depend on nothing but their own row."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from inferfleet.engine import sampler as sampler_module
from inferfleet.engine.logit_edits import edited
from inferfleet.engine.nucleus import Limits, pick_filtered
from inferfleet.engine.philox import philox4x32, uniforms
from inferfleet.engine.sampler import RowState, Sampler
from inferfleet.engine.sampling_params import SamplingParams

VOCABULARIES = (7, 256, 300, 1000, 4099)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Asked:
    """The part of a Request that the sampler reads."""

    sampling: SamplingParams
    id: str = "request"
    index: int = 0
    prompt_token_ids: list = field(default_factory=list)
    output_token_ids: list = field(default_factory=list)
    end_token_ids: frozenset = frozenset()


def row(prompt=(), output=(), ends=(), request_id="request", index=0, **params) -> RowState:
    request = Asked(SamplingParams(**params), request_id, index, list(prompt), list(output), frozenset(ends))
    return RowState(request)


def random_logits(rows, vocabulary, seed=0, spread=4.0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits, rows):
    return Sampler().sample(logits, rows)


# random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    def words(text):
        return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)

    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_a_uniform_depends_on_its_own_seed_index_and_position():
    places = np.array([(2**63 - 1, 0, 5), (1, 0, 5), (2**63 - 1, 1, 5), (2**63 - 1, 0, 6)], dtype=np.uint64)
    together = uniforms(*places.T)
    assert len(set(together)) == 4
    assert all((together >= 0) & (together < 1))
    assert [uniforms(*place[:, None])[0] for place in places] == together.tolist()


# greedy


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_greedy_picks_the_first_of_the_largest(vocabulary):
    logits = random_logits(9, vocabulary).round()  # many equal values
    assert sample(logits, [row(temperature=0)] * 9).token_ids == logits.argmax(-1).tolist()


def test_a_batch_of_greedy_rows_computes_one_argmax_and_nothing_else(monkeypatch):
    for name in ("_pick", "edited", "_draw", "uniforms"):
        monkeypatch.setattr(sampler_module, name, None)
    assert sample(random_logits(4, 50), [row(temperature=0)] * 4).failed == []


# distribution

FILTERS = [
    {},
    {"temperature": 0.4},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
]


def transformers_probabilities(logits, params, *, order):
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = {
        "temperature": lambda: TemperatureLogitsWarper(params.temperature),
        "min_p": lambda: MinPLogitsWarper(params.min_p),
        "top_k": lambda: TopKLogitsWarper(params.top_k),
        "top_p": lambda: TopPLogitsWarper(params.top_p),
    }
    default = SamplingParams()
    for name in order:
        if getattr(params, name) != getattr(default, name):
            logits = warpers[name]()(None, logits)
    return logits.softmax(-1)


def drawn_ids(logits, params, draws):
    """Tokens that `draws` evenly spread uniforms give for one row of logits: the inverse CDF, seen whole."""
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    probs = (logits / params.temperature).softmax(-1).expand(draws, -1).contiguous()
    limits = Limits.of(params)
    if not limits.any:
        return sampler_module._pick_any(probs, uniform)
    return pick_filtered(probs, [limits] * draws, uniform)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filtered_distributions_are_those_of_transformers(filters, seed):
    params = SamplingParams(**filters)
    logits = random_logits(1, 523, seed, spread=2.0)
    expected = transformers_probabilities(logits, params, order=("temperature", "min_p", "top_k", "top_p"))[0]

    draws = 4000
    found = drawn_ids(logits, params, draws).bincount(minlength=523) / draws

    assert set(found.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())
    # Evenly spread draws miss each token's probability by at most one step at each of its ends.
    assert (found - expected).abs().max() <= 1.01 / draws


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 8, "temperature": 1.5}], ids=str)
def test_sampled_tokens_follow_the_distribution(filters):
    draws, logits = 6000, random_logits(1, 40, spread=1.5)
    expected = transformers_probabilities(logits, SamplingParams(**filters), order=("temperature", "top_k", "top_p"))[0]

    state = row(seed=11, **filters)
    tokens = []
    for _ in range(draws // 100):  # one stream: every pick is a place in it
        batch = [row(seed=11, output=[0] * (len(tokens) + i), **filters) for i in range(100)]
        tokens += sample(logits.expand(100, -1), batch).token_ids

    possible = expected > 0
    observed = torch.tensor(tokens).bincount(minlength=40)
    assert observed[~possible].sum() == 0
    chi_square = ((observed - draws * expected) ** 2 / (draws * expected))[possible].sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # about 1 in 10000; the seed is fixed
    assert sample(logits, [state]).token_ids == tokens[:1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_token_of_a_flat_distribution_can_be_drawn(vocabulary):
    draws = vocabulary * 2
    found = drawn_ids(torch.zeros(1, vocabulary), SamplingParams(), draws)
    assert found.bincount(minlength=vocabulary).tolist() == [2] * vocabulary


def test_the_ends_of_the_uniform_range_give_possible_tokens():
    logits = torch.full((2, 600), -torch.inf)
    logits[:, [3, 290, 597]] = torch.tensor([1.0, 1.0, 1.0])
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert sampler_module._pick_any(logits.softmax(-1), uniform).tolist() == [3, 597]
    for limits in (Limits(0, 0.999, 0.0), Limits(2, 1.0, 0.0), Limits(500, 1.0, 0.0)):
        assert pick_filtered(logits.softmax(-1), [limits] * 2, uniform).tolist() == [3, 597]


# the floor of candidates


LIMITS = [
    Limits(0, 0.9, 0.0),
    Limits(900, 1.0, 0.0),
    Limits(0, 1.0, 1e-3),
    Limits(0, 0.99999, 0.0),
    Limits(3000, 0.5, 0.0),
    Limits(0, 0.5, 1e-3),
    Limits(10**6, 0.9, 0.0),
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 8.0])
def test_few_candidates_give_what_a_full_sort_gives(limits, spread, monkeypatch):
    probs = random_logits(64, 20_000, seed=5, spread=spread).softmax(-1)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quick = pick_filtered(probs, [limits] * 64, uniform)

    monkeypatch.setattr("inferfleet.engine.nucleus.FLOOR", 0.0)
    assert pick_filtered(probs, [limits] * 64, uniform).tolist() == quick.tolist()


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    probs = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1]])
    for limits in (Limits(2, 1.0, 0.0), Limits(0, 0.5, 0.0)):
        found = {pick_filtered(probs, [limits], torch.tensor([u / 50], dtype=torch.float64)).item() for u in range(50)}
        assert found == {0, 2, 3}


# penalties and other edits


def edited_logits(logits, rows):
    with edited(logits, rows):
        return logits.clone()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_repetition_penalty_is_that_of_transformers(seed):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1, 90, seed)
    prompt, output = [1, 1, 5, 80], [7, 5, 33]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    found = edited_logits(logits, [row(prompt, output, repetition_penalty=1.3)])
    assert torch.equal(found, expected)


def test_presence_and_frequency_count_the_output_only():
    logits = random_logits(1, 30)
    found = edited_logits(logits, [row([4, 9], [9, 9, 2], presence_penalty=0.5, frequency_penalty=0.25)])
    change = (found - logits)[0]
    assert change.nonzero()[:, 0].tolist() == [2, 9]
    assert change[2].item() == pytest.approx(-0.75)
    assert change[9].item() == pytest.approx(-1.0)


def test_counts_follow_the_output_as_it_grows():
    request = Asked(SamplingParams(frequency_penalty=1.0, repetition_penalty=1.1), prompt_token_ids=[1, 2])
    grown, logits = RowState(request), random_logits(1, 500)
    for token in np.random.default_rng(0).integers(0, 500, 300).tolist():
        request.output_token_ids.append(token)
        if token % 3 == 0:
            edited_logits(logits, [grown])
    assert torch.equal(edited_logits(logits, [grown]), edited_logits(logits, [RowState(request)]))


def test_prompt_tokens_that_the_model_cannot_pick_are_passed_over():
    logits = random_logits(1, 30)
    found = edited_logits(logits, [row([4, 30, 262_145], repetition_penalty=1.5)])
    assert (found != logits)[0].nonzero()[:, 0].tolist() == [4]


def test_logit_bias_is_added_and_can_force_or_ban_a_token():
    logits = random_logits(2, 50)
    worst, best = logits[0].argmin().item(), logits[1].argmax().item()
    rows = [row(temperature=0, logit_bias={worst: 100}), row(logit_bias={best: -100}, seed=3)]
    forced, other = sample(logits, rows).token_ids
    assert forced == worst
    assert other != best


def test_end_tokens_wait_for_min_tokens():
    logits = torch.zeros(2, 20)
    logits[:, 4] = 50.0
    early, late = (
        row(output=[1], ends=[4, 900], min_tokens=2, temperature=0),
        row(output=[1, 2], ends=[4], min_tokens=2),
    )
    assert sample(logits, [early, late]).token_ids == [0, 4]


def test_the_callers_logits_are_as_they_were():
    logits = random_logits(2, 60)
    before = logits.clone()
    params = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {3: 5.0}, "min_tokens": 9}
    sample(logits, [row([3, 4], [3], ends=[4], **params), row(temperature=0.5, top_p=0.5)])
    assert torch.equal(logits, before)


def test_penalties_at_their_limits_stay_finite():
    logits = torch.full((1, 8), 3e38)
    state = row(range(8), range(8), repetition_penalty=1e-6, presence_penalty=2.0, temperature=1e-5)
    assert sample(logits, [state]).failed == []


# independence

MIXED = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "top_k": 4, "temperature": 0.5},
    {"seed": 4, "min_p": 0.2, "repetition_penalty": 1.4},
    {"seed": 5, "logit_bias": {2: 3.0}, "frequency_penalty": 1.0},
    {"temperature": 0, "min_tokens": 5},
    {"top_p": 0.6, "min_p": 0.01, "top_k": 100, "logprobs": 2},
]


def mixed_rows(count):
    return [
        row([1, 2, i], [i, 2], ends=[0], request_id=f"r{i}", index=i % 3, **MIXED[i % len(MIXED)]) for i in range(count)
    ]


@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 50_257])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_a_row_alone_gives_its_pick_in_a_batch(vocabulary, spread):
    logits, rows = random_logits(32, vocabulary, spread=spread), mixed_rows(32)
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1].clone(), rows[i : i + 1]) for i in range(32)]
    backwards = sample(logits.flip(0), rows[::-1])
    assert [result.token_ids[0] for result in alone] == together.token_ids == backwards.token_ids[::-1]
    assert [(result.logprobs or [None])[0] for result in alone] == together.logprobs == backwards.logprobs[::-1]


def test_float64_and_bfloat16_logits_are_taken_as_float32():
    rows, logits = mixed_rows(8), random_logits(8, 300).bfloat16()
    expected = sample(logits.float(), rows).token_ids
    assert sample(logits, rows).token_ids == sample(logits.double(), rows).token_ids == expected


def test_the_same_place_gives_the_same_pick_and_the_next_place_another_stream():
    logits = torch.zeros(1, 10_000)
    picks = [sample(logits, [row(output=[5] * place, seed=9)]).token_ids[0] for place in (0, 0, 1, 2)]
    assert picks[0] == picks[1]
    assert len(set(picks)) == 3


def test_answers_and_requests_without_a_seed_differ_and_repeat():
    logits = torch.zeros(1, 100_000)

    def pick(**place):
        return sample(logits, [row(**place)]).token_ids[0]

    places = [{"request_id": "a"}, {"request_id": "b"}, {"request_id": "a", "index": 1}, {"seed": 0}]
    assert len({pick(**place) for place in places}) == 4
    assert pick(request_id="a") == pick(request_id="a")


# rows that are not finite


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_a_spoiled_row_fails_and_the_others_go_on(greedy, spoil):
    logits = random_logits(5, 700)
    rows = [row(**({"temperature": 0} if greedy else MIXED[i + 1])) for i in range(5)]
    expected = sample(logits, rows).token_ids
    logits[1, 650] = spoil
    logits[3] = -torch.inf
    found = sample(logits, rows)
    assert found.failed == [1, 3]
    assert [found.token_ids[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]


def test_logits_of_minus_infinity_are_tokens_that_never_come():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [7, 280]] = 0.0
    rows = [row(output=[0] * i) for i in range(40)]
    assert set(sample(logits.expand(40, -1), rows).token_ids) == {7, 280}


# logprobs


def test_logprobs_are_the_models_own_whatever_shapes_the_pick():
    logits = random_logits(3, 200)
    rows = [
        row(temperature=0, logprobs=3),
        row(logprobs=0, temperature=0.3, repetition_penalty=2.0, output=[5]),
        row(temperature=0),
    ]
    found = sample(logits, rows)
    expected = logits.log_softmax(-1)
    first, second, third = found.logprobs
    assert first.logprob == pytest.approx(expected[0, found.token_ids[0]].item(), abs=1e-6)
    assert [token for token, _ in first.top] == expected[0].topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-6)
    assert second.logprob == pytest.approx(expected[1, found.token_ids[1]].item(), abs=1e-6)
    assert second.top == ()
    assert third is None


def test_no_logprobs_are_computed_where_nobody_asked():
    assert sample(random_logits(2, 20), [row(), row(temperature=0)]).logprobs is None


def test_a_failed_row_has_no_logprobs():
    logits = random_logits(2, 20)
    logits[0, 3] = torch.nan
    assert sample(logits, [row(logprobs=1), row(logprobs=1)]).logprobs[0] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same_picks_alone_and_in_a_batch():
    logits, rows = random_logits(32, 262_144).cuda(), mixed_rows(32)
    together = sample(logits, rows).token_ids
    assert [sample(logits[i : i + 1].clone(), rows[i : i + 1]).token_ids[0] for i in range(32)] == together
