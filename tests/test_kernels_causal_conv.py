"""The causal convolution: the compiled form and the one without a loop over rows, against the plain reference.

Tolerances: float32 to 2e-6, a sum of few products; bfloat16 to 2^-6, where a rounding before silu may tip. States are
copies of inputs and must be exact.
"""

import pytest
import torch
import torch.nn.functional as F

from inferfleet.kernels import causal_conv

DTYPES = [torch.float32, torch.bfloat16]
FORMS = {"compiled": causal_conv.causal_conv, "gathered": causal_conv.gathered}


def inputs(lengths, channels=20, taps=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    rows = len(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    state = normal(2 * rows + 2, taps - 1, channels)
    return [normal(sum(lengths), channels), normal(taps, channels), state, torch.arange(rows) * 2 + 1, starts]


def run(form, arguments):
    arguments = list(arguments)
    arguments[2] = arguments[2].clone()
    return form(*arguments), arguments[2]


def assert_same(actual, expected):
    (out, state), (expected_out, expected_state) = actual, expected
    assert out.dtype == expected_out.dtype
    rtol = 2e-6 if out.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out, expected_out, rtol=rtol, atol=2e-6 if rtol == 2e-6 else 2e-2)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps"), [(20, 4), (1100, 4), (16, 2), (5, 3), (33, 7)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference_on_a_ragged_batch(form, channels, taps, dtype):
    # Given rows shorter than the kernel, as long, and longer,
    arguments = inputs([1, 2, 3, 4, 5, 1, 30], channels, taps, dtype)
    # when a form runs them, then outputs and states are the reference's, and no other slot is touched.
    actual = run(FORMS[form], arguments)
    assert_same(actual, run(causal_conv.reference, arguments))
    assert torch.equal(actual[1][0::2], arguments[2][0::2])


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_a_row_from_an_empty_state_is_torchs_convolution_padded_on_the_left(form):
    x, weight, state, slots, starts = inputs([25], channels=12, taps=4)
    state.zero_()
    padded = F.conv1d(x.t()[None], weight.t()[:, None], padding=3, groups=12)[0, :, :25].t()

    out = FORMS.get(form, causal_conv.reference)(x, weight, state, slots, starts)

    torch.testing.assert_close(out, F.silu(padded), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_a_row_cut_anywhere_ends_in_the_same_state(form, dtype):
    # Given one row of 12 tokens,
    function = FORMS.get(form, causal_conv.reference)
    x, weight, state, slots, starts = inputs([12], channels=24, dtype=dtype)
    whole = run(function, (x, weight, state, slots, starts))
    for cut in range(1, 12):
        # when it comes in two steps, then nobody can tell.
        now = state.clone()
        outs = [
            function(part, weight, now, slots, torch.tensor([0, len(part)], dtype=torch.int32))
            for part in (x[:cut], x[cut:])
        ]
        assert_same((torch.cat(outs), now), whole)
        if form == "compiled" and causal_conv._native() is not None:
            assert torch.equal(outs[1], whole[0][cut:])


def test_channels_may_lie_in_wider_rows():
    x, *others = inputs([9, 2], channels=16)
    wide = torch.cat((torch.ones(11, 3), x, torch.ones(11, 5)), dim=1)

    assert_same(run(causal_conv.causal_conv, (wide[:, 3:19], *others)), run(causal_conv.reference, (x, *others)))


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_spoils_its_own_channel_and_row_alone(form):
    arguments = inputs([3, 4, 5])
    arguments[0][4, 7] = float("nan")

    out, _ = run(FORMS[form], arguments)

    assert out[4:7, 7].isnan().all()
    assert int(out.isnan().sum()) == 3
