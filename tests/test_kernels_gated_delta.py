"""The gated delta rule: the compiled and the chunked form against the token by token reference.

Tolerances: float32 to 2e-5 of numbers of size 1 (a state sums hundreds of products in another order); bfloat16 outputs
to 2^-7, one rounding; the float32 state is held to 2e-5 in both.
"""

import pytest
import torch

from inferfleet.kernels import gated_delta

DTYPES = [torch.float32, torch.bfloat16]
FORMS = {"compiled": gated_delta.gated_delta, "chunked": gated_delta.chunked}
#: hk, hv, dk, dv: equal heads, two and four value heads a key head, widths that are no multiple of a vector.
SHAPES = [(2, 2, 16, 16), (2, 4, 32, 80), (1, 4, 24, 20), (3, 6, 8, 129)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(lengths, shape=(2, 4, 32, 80), dtype=torch.float32, seed=0, forget=1.0):
    """Arguments of the op for rows of such lengths, in slots 1, 3, 5..., with states that are not empty."""
    hk, hv, dk, dv = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    tokens, rows = sum(lengths), len(lengths)
    slots = torch.arange(rows) * 2 + 1
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v = normal(tokens, hk, dk).to(dtype), normal(tokens, hk, dk).to(dtype), normal(tokens, hv, dv).to(dtype)
    g, beta = -forget * torch.rand(tokens, hv, generator=generator), torch.rand(tokens, hv, generator=generator)
    return [q, k, v, g, beta, normal(2 * rows + 2, hv, dk, dv) * 0.3, slots, starts]


def run(form, arguments):
    """(out, state afterwards) without touching the arguments."""
    arguments = list(arguments)
    arguments[5] = arguments[5].clone()
    return form(*arguments), arguments[5]


def assert_same(actual, expected):
    (out, state), (expected_out, expected_state) = actual, expected
    assert out.dtype == expected_out.dtype and out.shape == expected_out.shape
    rtol = 2e-5 if out.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out, expected_out, rtol=rtol, atol=2e-5 if rtol == 2e-5 else 1e-3)
    torch.testing.assert_close(state, expected_state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference_on_a_ragged_batch(form, shape, dtype):
    # Given rows of one token, around the chunk of 64, and of three chunks,
    arguments = inputs([1, 63, 7, 64, 1, 65, 130], shape, dtype)
    # when a form runs them, then outputs and states are the reference's, and no other slot is touched.
    actual = run(FORMS[form], arguments)
    assert_same(actual, run(gated_delta.reference, arguments))
    assert torch.equal(actual[1][0::2], arguments[5][0::2])


def test_one_token_by_hand():
    # Given S = [[1, 2]], a key and a query of length 2 in one dimension, v = (5, 8), half forgotten, beta 1/2,
    state = torch.tensor([[[[1.0, 2.0]]]])
    one = torch.tensor([[[2.0]]])
    half = torch.tensor([[0.5]])
    arguments = (one, one, torch.tensor([[[5.0, 8.0]]]), half.log(), half, state, torch.tensor([0]))
    # when the token is met, then S is halved, moves half way to v, and is read.
    out = gated_delta.gated_delta(*arguments, torch.tensor([0, 1], dtype=torch.int32))
    torch.testing.assert_close(state, torch.tensor([[[[2.75, 4.5]]]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(out, torch.tensor([[[2.75, 4.5]]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_a_row_cut_anywhere_ends_in_the_same_state(form, dtype):
    # Given one row of 70 tokens,
    function = FORMS.get(form, gated_delta.reference)
    q, k, v, g, beta, state, slots, starts = inputs([70], (2, 4, 16, 32), dtype)
    whole = run(function, (q, k, v, g, beta, state, slots, starts))
    for cut in range(1, 70):
        # when it comes in two steps,
        now, outs = state.clone(), []
        for part in (slice(0, cut), slice(cut, 70)):
            count = part.stop - part.start
            ends = torch.tensor([0, count], dtype=torch.int32)
            outs.append(function(q[part], k[part], v[part], g[part], beta[part], now, slots, ends))
        # then nobody can tell.
        assert_same((torch.cat(outs), now), whole)


def test_the_compiled_form_gives_the_same_bits_however_a_row_is_cut_and_whoever_shares_the_step():
    # Given three rows of which one is looked at, and a build with a compiler,
    if gated_delta._native() is None:
        pytest.skip("no C++ compiler on PATH")
    q, k, v, g, beta, state, slots, starts = inputs([5, 150, 40], (2, 4, 32, 80), torch.bfloat16)
    together = run(gated_delta.gated_delta, (q, k, v, g, beta, state, slots, starts))
    # when its tokens come alone and in steps of 1, 64, 65 and the rest,
    now, outs, begin = state.clone(), [], 5
    for count in (1, 64, 65, 20):
        part = slice(begin, begin + count)
        ends = torch.tensor([0, count], dtype=torch.int32)
        outs.append(gated_delta.gated_delta(q[part], k[part], v[part], g[part], beta[part], now, slots[1:2], ends))
        begin += count
    # then every bit is the same.
    assert torch.equal(torch.cat(outs), together[0][5:155])
    assert torch.equal(now[slots[1]], together[1][slots[1]])


def test_a_batch_of_single_tokens_equals_the_reference_without_a_compiler(monkeypatch):
    monkeypatch.setattr(gated_delta, "_native", lambda: None)
    arguments = inputs([1] * 9)

    assert_same(run(gated_delta.gated_delta, arguments), run(gated_delta.reference, arguments))


def test_heads_may_lie_in_wider_rows():
    # Given q, k and v as slices of one projection, as a model has them,
    hk, hv, dk, dv = 2, 4, 16, 24
    arguments = inputs([9, 3], (hk, hv, dk, dv))
    mixed = torch.cat([x.flatten(1) for x in arguments[:3]], dim=1)
    q, k, v = mixed.split([hk * dk, hk * dk, hv * dv], dim=1)
    sliced = [q.view(-1, hk, dk), k.view(-1, hk, dk), v.view(-1, hv, dv), *arguments[3:]]
    # when they are met, then the gaps between tokens do not show.
    assert_same(run(gated_delta.gated_delta, sliced), run(gated_delta.reference, arguments))


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_is_all_but_forgotten_stays_finite(form):
    # Given decays down to exp(-500) a token, whose products are far below what float32 holds,
    arguments = inputs([100], forget=500.0)
    # when the row runs, then nothing overflows on the way.
    actual = run(FORMS[form], arguments)
    assert_same(actual, run(gated_delta.reference, arguments))
    assert actual[0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_nan_spoils_only_itself(form):
    arguments = inputs([4, 5, 6])
    arguments[2][5, 1, 3] = float("nan")

    out, state = run(FORMS[form], arguments)

    assert out[5:9, 1, 3].isnan().all()
    assert not out[:4].isnan().any() and not out[9:].isnan().any()
    assert not state[1].isnan().any() and not state[5].isnan().any()
