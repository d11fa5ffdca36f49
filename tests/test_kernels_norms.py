"""Row-wise kernels (norms, rotary, gated activation): the public function against the plain reference.

Tolerances: float32 to 2e-6 relative; bfloat16 to 2^-6, where the order of a sum may tip one rounding and the next
multiplies it.
"""

import pytest
import torch

from inferfleet.kernels import gated_activation, rms_norm, rotary

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STYLES = ["llama", "gemma", "zero_centered"]


def assert_same(actual, expected, atol=2e-6):
    assert actual.dtype == expected.dtype
    rtol = 2e-6 if actual.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def numbers(*shape, dtype, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (3, 5, 64), (129, 640), (0, 16)])
def test_rms_norm_equals_its_reference_in_every_style(shape, style, dtype):
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype, seed=1)

    assert_same(rms_norm.rms_norm(x, weight, 1e-6, style=style), rms_norm.reference(x, weight, 1e-6, style=style))
    assert_same(rms_norm.rms_norm(x, None, 1e-6, style=style), rms_norm.reference(x, None, 1e-6, style=style))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_reads_a_slice_of_wider_rows(dtype):
    qkv = numbers(9, 160, dtype=dtype)
    heads, weight = qkv[:, 32:96].view(9, 2, 32), numbers(32, dtype=dtype)

    assert_same(rms_norm.rms_norm(heads, weight, 1e-6), rms_norm.reference(heads, weight, 1e-6))
    columns = qkv[:, 8:72]
    assert_same(rms_norm.rms_norm(columns, None, 1e-6), rms_norm.reference(columns, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rows,width", [(1, 1024), (33, 96), (65, 1000)])
def test_add_rms_norm_gives_the_sum_and_its_norm(rows, width, style, dtype):
    x, residual = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=1)
    weight = numbers(width, dtype=dtype, seed=2)

    normed, total = rms_norm.add_rms_norm(x, residual, weight, 1e-5, style=style)

    expected, expected_total = rms_norm.add_reference(x, residual, weight, 1e-5, style=style)
    assert torch.equal(total, expected_total)
    assert_same(normed, expected)


def test_a_row_of_nan_stays_nan_and_leaves_its_neighbours_alone():
    x = numbers(4, 64, dtype=torch.bfloat16)
    x[2, 5] = float("nan")

    normed = rms_norm.rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-6)

    assert normed[2].isnan().all()
    assert not normed[[0, 1, 3]].isnan().any()


def angles(tokens, width, seed=3):
    angle = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(seed)) * 6.3
    angle = torch.cat((angle, angle), dim=1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens,heads,width,turned", [(1, 16, 128, 128), (5, 3, 64, 64), (40, 2, 96, 24), (6, 1, 512, 128)]
)
def test_rotary_equals_its_reference_whole_and_partial(tokens, heads, width, turned, dtype):
    x, (cos, sin) = numbers(tokens, heads, width, dtype=dtype), angles(tokens, turned)

    assert_same(rotary.apply_rotary(x, cos, sin), rotary.reference(x, cos, sin))


def test_rotary_by_hand_turns_the_first_pair_by_a_right_angle():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])

    assert rotary.apply_rotary(x, cos, sin).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,width,turned", [(16, 128, 128), (3, 64, 64), (2, 96, 24), (1, 10, 6)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rotary_of_pairs_equals_its_reference_on_a_slice_of_wider_rows(tokens, heads, width, turned, dtype):
    rows = numbers(tokens, (heads + 2) * width, dtype=dtype)
    x, (cos, sin) = rows[:, width : (heads + 1) * width].view(tokens, heads, width), angles(tokens, turned)

    assert_same(rotary.apply_rotary_pairs(x, cos, sin), rotary.pairs_reference(x, cos, sin))


def test_rotary_of_pairs_is_a_product_of_complex_numbers():
    x, (cos, sin) = numbers(6, 3, 32, dtype=torch.float32), angles(6, 24)

    actual = rotary.apply_rotary_pairs(x, cos, sin)

    turn = torch.complex(cos, sin)[:, None, :12]
    expected = torch.view_as_complex(x[..., :24].reshape(6, 3, 12, 2)) * turn
    assert_same(actual[..., :24], torch.view_as_real(expected).flatten(2))
    assert torch.equal(actual[..., 24:], x[..., 24:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_norm_rotary_equals_norm_then_rotary_on_a_slice_of_qkv(style, dtype):
    qkv, weight = numbers(11, 8 * 64, dtype=dtype), numbers(64, dtype=dtype, seed=5)
    keys, (cos, sin) = qkv[:, 256:384].view(11, 2, 64), angles(11, 64)

    actual = rotary.norm_rotary(keys, weight, 1e-6, cos, sin, style=style)

    assert_same(actual, rotary.norm_reference(keys, weight, 1e-6, cos, sin, style=style))
    unweighted = rotary.norm_rotary(keys, None, 1e-6, cos, sin)
    assert_same(unweighted, rotary.norm_reference(keys, None, 1e-6, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows,width", [(1, 3072), (7, 19), (70, 704)])
def test_gated_activation_equals_its_reference(rows, width, kind, dtype):
    gate_up = numbers(rows, 2 * width, dtype=dtype, spread=6.0)

    actual, expected = gated_activation.gated_activation(gate_up, kind), gated_activation.reference(gate_up, kind)

    # Torch's 1 + tanh(u) cancels far left of zero: an error of 1e-7 times gate and up, which the C++ form has not.
    assert_same(actual, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation_is_right_far_from_zero_and_keeps_nan(kind):
    gate = torch.tensor([-1e4, -100.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 100.0, 1e4])
    gate_up = torch.cat((gate, torch.ones(9))).unsqueeze(0)

    actual = gated_activation.gated_activation(gate_up, kind)

    torch.testing.assert_close(actual, gated_activation.reference(gate_up, kind), rtol=2e-6, atol=1e-7)
    assert gated_activation.gated_activation(torch.full((1, 32), float("nan")), kind).isnan().all()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="silu or gelu_tanh"):
        gated_activation.gated_activation(torch.ones(1, 4), "relu")
