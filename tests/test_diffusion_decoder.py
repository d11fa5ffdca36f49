"""The VAE's side: tiles, pictures that are none, float32 when half precision fails, init images."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small_pipeline import Shape, components
from torch import nn

from inferfleet.engine.diffusion.decoder import Decoder, _ramp, _tiles
from inferfleet.engine.diffusion.pipeline import build_vae
from inferfleet.engine.errors import NumericalError


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    config, tensors = components(Shape(), torch.Generator().manual_seed(0))["vae"]
    vae = build_vae(config, torch.float32)
    vae.load_state_dict(tensors, assign=True)
    return vae


def decoder(vae, tiling_pixels: int = 1 << 30) -> Decoder:
    return Decoder(vae, vae_scale=8, tiling_pixels=tiling_pixels)


def latents(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> torch.Tensor:
    """Latents that change slowly, as those of pictures do."""
    return nn.functional.interpolate(latents(3, 3), (height, width), mode="bicubic", align_corners=True)


def test_a_picture_within_the_limit_goes_through_in_one_piece(vae):
    whole = decoder(vae, 96 * 64)
    z = latents(8, 12)
    expected = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    assert torch.equal(whole.decode(z), expected)


def test_a_larger_one_goes_through_in_tiles_of_bounded_size_without_seams(vae, monkeypatch):
    # Given a decoder that may take 128 x 128 pixels at once,
    tiled, whole = decoder(vae, 128 * 128), decoder(vae)
    sizes = []
    real = vae.decode

    def decode(z, **how):
        sizes.append(tuple(z.shape[-2:]))
        return real(z, **how)

    z = smooth(40, 28)
    expected = whole.decode(z)
    monkeypatch.setattr(vae, "decode", decode)
    # when a picture of 320 x 224 is decoded,
    found = tiled.decode(z)
    assert found.shape == expected.shape == (1, 3, 320, 224)
    assert len(sizes) > 4
    assert all(height * width * 64 <= 128 * 128 for height, width in sizes)
    # then across seams the picture changes no more than elsewhere.
    down = (found[..., 1:, :] - found[..., :-1, :]).abs().amax(dim=(0, 1, 3))
    assert down.max() <= 2.0 * down.median() + (expected[..., 1:, :] - expected[..., :-1, :]).abs().max()


def test_tiles_of_a_map_without_surroundings_are_that_map(vae):
    # A function that looks at one latent only must come out as if there were no tiles.
    one = decoder(vae, 64 * 64)
    x = latents(37, 21)
    found = one._tiled(lambda part: part.repeat_interleave(8, -1).repeat_interleave(8, -2) * 2, x, 1, 8)
    torch.testing.assert_close(found, x.repeat_interleave(8, -1).repeat_interleave(8, -2) * 2)


@pytest.mark.parametrize(("size", "side"), [(5, 8), (8, 8), (9, 8), (64, 16), (257, 128), (17, 16), (100, 2)])
def test_tiles_cover_everything_and_overlap(size, side):
    tiles = list(_tiles(size, side))
    assert tiles[0][0].start == 0 and tiles[-1][0].stop == size
    assert all(place.stop - place.start <= side for place, _ in tiles)
    total = torch.zeros(size * 8)
    for place, ends in tiles:
        weights = _ramp(place, *ends, 8)
        assert (weights > 0).all() and (weights <= 1).all()
        total[place.start * 8 : place.stop * 8] += weights
    assert (total > 0).all()
    for (first, (_, after)), (second, (before, _)) in pairwise(tiles):
        assert after == before == first.stop - second.start >= 1


def test_an_init_image_is_encoded_in_tiles_too(vae):
    pixels = torch.randint(0, 256, (224, 160, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    moments = decoder(vae, 96 * 96).encode(pixels)
    assert moments.shape == (1, 32, 28, 20)
    assert moments.isfinite().all()
    whole = decoder(vae).encode(pixels)
    assert (moments - whole).abs().mean() < 0.5 * whole.std()


def test_broken_latents_make_no_picture(vae):
    z = latents(4, 4)
    z[0, 3, 1, 1] = float("inf")
    with pytest.raises(NumericalError, match="latents are not finite"):
        decoder(vae).paint(z)


class Half:
    """A VAE in bfloat16 whose decode goes wrong in that format, and in float32 as well if `always`."""

    def __init__(self, vae, value: float, *, always: bool) -> None:
        config, tensors = components(Shape(), torch.Generator().manual_seed(0))["vae"]
        self.vae = build_vae(config, torch.bfloat16)
        self.vae.load_state_dict({name: tensor.bfloat16() for name, tensor in tensors.items()}, assign=True)
        real, self.dtypes = self.vae.decode, []

        def decode(z, **how):
            self.dtypes.append(z.dtype)
            image = real(z, **how)[0]
            return (torch.full_like(image, value) if always or z.dtype == torch.bfloat16 else image,)

        self.vae.decode = decode


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.25])
def test_a_picture_that_fails_in_half_precision_is_decoded_once_more_in_float32(vae, value):
    half = Half(vae, value, always=False)
    one = decoder(half.vae)
    before = {name: tensor.clone() for name, tensor in half.vae.state_dict().items()}
    pixels = one.paint(latents(4, 6).bfloat16())
    assert half.dtypes == [torch.bfloat16, torch.float32]
    assert pixels.shape == (32, 48, 3)
    assert pixels.float().std() > 5
    assert one.num_retries == 1
    # And the weights are what they were.
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.vae.state_dict().items())
    assert one.dtype == torch.bfloat16


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (1.0, "one colour only")])
def test_one_that_fails_in_float32_too_is_an_error(vae, value, message):
    half = Half(vae, value, always=True)
    with pytest.raises(NumericalError, match=message):
        decoder(half.vae).paint(latents(4, 4).bfloat16())
    assert half.dtypes == [torch.bfloat16, torch.float32]
    assert half.vae.dtype == torch.bfloat16


def test_a_picture_that_is_all_but_white_passes(vae, monkeypatch):
    # A model that paints white does not hit one number everywhere, though its pixels are all 255.
    image = 1.1 + 0.1 * torch.rand(1, 3, 32, 32)
    monkeypatch.setattr(vae, "decode", lambda z, **how: (image,))
    assert (decoder(vae).paint(latents(4, 4)) == 255).all()
