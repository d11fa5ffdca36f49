"""The layer norm kernel against its plain reference, and the reference against torch's own.

Tolerances as in test_kernels_norms.py: float32 to 2e-6, bfloat16 to one tipped rounding.
"""

import pytest
import torch

from inferfleet.kernels import layer_norm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    rtol = 2e-6 if actual.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=4e-6)


def numbers(*shape, dtype, seed=0, centre=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + centre).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (3, 5, 64), (129, 640), (0, 16)])
def test_layer_norm_equals_its_reference_and_torchs_own(shape, dtype):
    x, (weight, bias) = numbers(*shape, dtype=dtype), numbers(2, shape[-1], dtype=dtype, seed=1)

    actual = layer_norm.layer_norm(x, weight, bias, 1e-5)

    assert_same(actual, layer_norm.reference(x, weight, bias, 1e-5))
    assert_same(actual, torch.nn.functional.layer_norm(x, shape[-1:], weight, bias, 1e-5))


def test_a_mean_far_from_zero_costs_no_more_than_its_own_rounding():
    # Given rows a thousand deviations away from zero, where the mean of squares less the squared mean would be noise,
    x, (weight, bias) = numbers(9, 512, dtype=torch.float32, centre=2000.0), numbers(2, 512, dtype=torch.float32)

    actual = layer_norm.layer_norm(x, weight, bias, 1e-5)

    exact = torch.nn.functional.layer_norm(x.double(), (512,), weight.double(), bias.double(), 1e-5)
    assert float((actual - exact).abs().max()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_reads_a_slice_of_wider_rows(dtype):
    wide, (weight, bias) = numbers(9, 160, dtype=dtype), numbers(2, 64, dtype=dtype, seed=1)

    columns = wide[:, 8:72]
    assert_same(layer_norm.layer_norm(columns, weight, bias, 1e-6), layer_norm.reference(columns, weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 1024), (33, 96), (65, 1000)])
def test_add_layer_norm_gives_the_sum_and_its_norm(rows, width, dtype):
    x, residual = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=1)
    weight, bias = numbers(2, width, dtype=dtype, seed=2)

    normed, total = layer_norm.add_layer_norm(x, residual, weight, bias, 1e-5)

    expected, expected_total = layer_norm.add_reference(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, expected_total)
    assert_same(normed, expected)


def test_a_row_of_nan_stays_nan_and_leaves_its_neighbours_alone():
    x = numbers(4, 64, dtype=torch.bfloat16)
    x[2, 5] = float("nan")

    normed = layer_norm.layer_norm(x, *torch.ones(2, 64, dtype=torch.bfloat16), 1e-6)

    assert normed[2].isnan().all()
    assert not normed[[0, 1, 3]].isnan().any()
