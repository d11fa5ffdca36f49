"""Our pictures against diffusers.FluxPipeline and FluxImg2ImgPipeline, from the same random generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from parity.checkpoints.flux import SHAPES, Shape, reference, write
from parity.device import DEVICE
from PIL import Image

from inferfleet.engine.diffusion.latents import pack
from inferfleet.engine.offline import ImageGenerator

LATENTS, PIXELS = 1e-4, 1
LICENCE = "flux-1-dev-non-commercial-license"
PROMPT = "a red circle on the left of a blue square"
SETTINGS = {"dtype": "float32", "device": str(DEVICE), "accept_licence": LICENCE}


@dataclass
class Pair:
    shape: Shape
    folder: Path
    ours: ImageGenerator
    judge: FluxPipeline


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[int], Pair]:
    made: dict[int, Pair] = {}

    def get(seed: int) -> Pair:
        if seed not in made:
            folder = tmp_path_factory.mktemp(f"flux-{seed}-")
            shape = write(folder, seed)
            made[seed] = Pair(shape, folder, ImageGenerator(str(folder), **SETTINGS), reference(folder))
        return made[seed]

    return get


def judged(pair: Pair, how: dict[str, Any], kind: str, *, prompt: str = PROMPT) -> Any:
    """What the judge makes of the same request."""
    values = {"max_sequence_length": pair.ours.card["max_sequence_length"]} | how
    random = torch.Generator("cpu").manual_seed(values.pop("seed"))
    judge = pair.judge
    if image := values.pop("init_image", None):
        values["image"] = image
        judge = FluxImg2ImgPipeline(**pair.judge.components)
        judge.set_progress_bar_config(disable=True)
    return judge(prompt, generator=random, output_type=kind, **values).images


def compare(pair: Pair, how: dict[str, Any]) -> None:
    ours = pack(pair.ours.latents(PROMPT, **how)[0]).cpu()
    theirs = judged(pair, how, "latent")
    assert (ours - theirs).abs().max() <= LATENTS
    assert theirs.std() > 0.3  # a comparison of something
    picture = np.asarray(pair.ours.generate(PROMPT, **how)).astype(int)
    assert picture.shape == (how["height"], how["width"], 3)
    assert np.abs(picture - np.asarray(judged(pair, how, "pil")[0]).astype(int)).max() <= PIXELS


def request(pair: Pair, seed: int, size: tuple[int, int], steps: int, guidance: float, **more: Any) -> dict[str, Any]:
    how = {"seed": seed, "width": size[0], "height": size[1], "num_inference_steps": steps, **more}
    return how | ({"guidance_scale": guidance} if pair.shape.guided else {})


SAMPLE = [
    (0, (64, 64), 4, 0.0),
    (1, (96, 48), 3, 3.5),
    (2, (32, 80), 1, 0.0),
    (3, (48, 48), 8, 1.5),
]
MATRIX = [
    (seed, size, steps, guidance)
    for seed in range(len(SHAPES) + 2)
    for size in ((64, 64), (112, 48), (16, 16), (48, 160))
    for steps in (1, 2, 5, 8)
    for guidance in (0.0, 3.5, 30.0)
    if guidance == 0.0 or seed % 2
]


@pytest.mark.parametrize(("seed", "size", "steps", "guidance"), SAMPLE)
def test_a_picture_is_the_one_that_diffusers_makes(pair, seed, size, steps, guidance):
    one = pair(seed)
    compare(one, request(one, 100 + seed, size, steps, guidance))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "size", "steps", "guidance"), MATRIX)
def test_every_shape_size_and_schedule_agrees(pair, seed, size, steps, guidance):
    one = pair(seed)
    for number in range(3):
        compare(one, request(one, 7 * number + seed, size, steps, guidance))


@pytest.mark.parametrize(("seed", "length"), [(0, 37), (1, 99), pytest.param(3, 11, marks=pytest.mark.slow)])
def test_an_odd_sequence_length_changes_nothing(pair, seed, length):
    one = pair(seed)
    compare(one, request(one, 3, (48, 64), 2, 2.0, max_sequence_length=length))


def start_image(size: tuple[int, int]) -> Image.Image:
    """A picture with an inside."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    colours = [rows * 255 // size[1], columns * 255 // size[0], (rows + columns) % 256]
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8))


EDITS = [(0, (64, 48), 4, 0.6), (1, (48, 64), 5, 0.3), (0, (48, 48), 3, 1.0)]
MORE_EDITS = [
    (seed, size, steps, strength)
    for seed in range(4)
    for size in ((64, 64), (96, 32))
    for steps in (1, 4, 8)
    for strength in (0.05, 0.5, 0.95)
]


@pytest.mark.parametrize(("seed", "size", "steps", "strength"), EDITS)
def test_an_edit_is_the_one_that_diffusers_makes(pair, seed, size, steps, strength):
    one = pair(seed)
    compare(one, request(one, 11, size, steps, 3.5, strength=strength, init_image=start_image(size)))


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "size", "steps", "strength"), MORE_EDITS)
def test_every_strength_agrees(pair, seed, size, steps, strength):
    one = pair(seed)
    compare(one, request(one, 5, size, steps, 3.5, strength=strength, init_image=start_image(size)))


def test_picture_i_of_a_request_is_the_first_one_of_seed_plus_i(pair):
    one = pair(0)
    how = request(one, 40, (48, 48), 2, 0.0)
    for index, latents in enumerate(one.ours.latents(PROMPT, n=3, **how)):
        assert (pack(latents).cpu() - judged(one, how | {"seed": 40 + index}, "latent")).abs().max() <= LATENTS


@pytest.mark.parametrize("seed", [0, 1])
def test_in_bfloat16_pictures_are_finite_and_alive(pair, seed):
    one = pair(seed)
    half = ImageGenerator(str(one.folder), **SETTINGS | {"dtype": "bfloat16"})
    how = request(one, 4, (64, 64), 4, 3.5)
    latents = half.latents(PROMPT, **how)[0]
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()
    picture = np.asarray(half.generate(PROMPT, **how))
    assert picture.std() > 5
    # And in the main it is the picture of float32.
    whole = one.ours.latents(PROMPT, **how)[0]
    assert torch.nn.functional.cosine_similarity(latents.float().flatten(), whole.flatten(), dim=0) > 0.6
