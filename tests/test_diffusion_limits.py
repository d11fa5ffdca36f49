"""A request against a model's limits: what is refused says the field and the limit."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from inferfleet.engine.diffusion import limits as engine_limits
from inferfleet.engine.diffusion.limits import MAX_SEED, Limits, first_step
from inferfleet.engine.diffusion.params import ImageParams, LoraChoice
from inferfleet.engine.errors import InvalidRequest, LoadError
from inferfleet.tasks.contracts import contract, images


def limits(guided: bool = True, **changes) -> Limits:
    usual = {
        "guided": guided,
        "max_sequence_length": 256,
        "default_size": 1024,
        "max_pixels": 2048 * 2048,
        "vae_scale": 8,
        "lora_names": ("ink", "oil"),
    }
    return Limits.of(**usual | changes)


def params(**changes) -> ImageParams:
    return ImageParams(**{"prompt": "a fox", "seed": 7} | changes)


def test_what_is_left_out_is_the_models_own():
    wanted = limits().settle(params())
    assert (wanted.width, wanted.height, wanted.n) == (1024, 1024, 1)
    assert (wanted.num_inference_steps, wanted.guidance_scale, wanted.max_sequence_length) == (28, 3.5, 256)
    assert (wanted.strength, wanted.first_step, wanted.num_steps) == (None, 0, 28)
    wanted = limits(guided=False).settle(params())
    assert (wanted.num_inference_steps, wanted.guidance_scale) == (4, None)


def test_what_is_within_the_limits_passes_unchanged():
    given = params(
        width=4096, height=1024, n=10, num_inference_steps=100, guidance_scale=30, seed=MAX_SEED,
        max_sequence_length=1, output_format="webp", output_compression=0, preview_every=100, embed_prompt=True,
        loras=(LoraChoice(name="ink", scale=-2.0), LoraChoice(name="oil", scale=2)),
    )  # fmt: skip
    wanted = limits().settle(given)
    assert (wanted.width, wanted.height, wanted.n, wanted.seed) == (4096, 1024, 10, MAX_SEED)
    assert (wanted.num_inference_steps, wanted.guidance_scale, wanted.output_compression) == (100, 30.0, 0)
    assert wanted.loras == given.loras


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"width": 17, "height": 64}, "width", "multiple of 16, not 17"),
        ({"width": 0, "height": 64}, "width", "16 to 4096, not 0"),
        ({"width": 64, "height": 100_000}, "height", "16 to 4096, not 100000"),
        ({"width": 64.0, "height": 64}, "width", "whole number"),
        ({"width": True, "height": 64}, "width", "whole number"),
        ({"width": 64}, "height", "both width and height"),
        ({"height": 64}, "width", "both width and height"),
        ({"width": 4096, "height": 2048}, "width", "8388608 pixels; this model paints at most 4194304"),
        ({"n": 0}, "n", "1 to 10, not 0"),
        ({"n": 10_000}, "n", "1 to 10, not 10000"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 100, not 0"),
        ({"num_inference_steps": 10**6}, "num_inference_steps", "1 to 100, not 1000000"),
        ({"guidance_scale": math.inf}, "guidance_scale", "0 to 30, not inf"),
        ({"guidance_scale": math.nan}, "guidance_scale", "0 to 30, not nan"),
        ({"guidance_scale": -0.1}, "guidance_scale", "0 to 30"),
        ({"guidance_scale": 10**400}, "guidance_scale", "0 to 30"),
        ({"guidance_scale": "3"}, "guidance_scale", "must be a number"),
        ({"seed": -1}, "seed", "not -1"),
        ({"seed": MAX_SEED + 1}, "seed", f"0 to {MAX_SEED}"),
        ({"max_sequence_length": 257}, "max_sequence_length", "1 to 256, not 257"),
        ({"max_sequence_length": 0}, "max_sequence_length", "1 to 256"),
        ({"strength": 0.5}, "strength", "needs an init image"),
        ({"init_image": b"png", "strength": 2}, "strength", "0 to 1, not 2"),
        ({"init_image": b"png", "strength": 0}, "strength", "above 0"),
        ({"init_image": b"png", "strength": math.nan}, "strength", "0 to 1, not nan"),
        ({"init_image": b"png", "strength": 1e-300}, "strength", "leaves none of 28 steps"),
        ({"loras": (LoraChoice(name="nobody"),)}, "loras", "no LoRA adapter 'nobody'; this model has ink, oil"),
        ({"loras": (LoraChoice(name="ink"), LoraChoice(name="ink"))}, "loras", "named twice"),
        ({"loras": (LoraChoice(name="ink", scale=math.inf),)}, "loras", "scale of 'ink' must be a number from -2 to 2"),
        ({"loras": (LoraChoice(name="ink"),) * 5}, "loras", "5 entries; at most 4"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "for jpeg and webp"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "0 to 100"),
        ({"preview_every": 0}, "preview_every", "1 to 100"),
        ({"embed_prompt": "yes"}, "embed_prompt", "true or false"),
        ({"embed_prompt": True, "output_format": "jpeg", "prompt": "ü" * 10_001}, "embed_prompt", "JPEG"),
    ],
)
def test_what_is_outside_is_refused_by_name_and_limit(changes, param, message):
    with pytest.raises(InvalidRequest) as refusal:
        limits().settle(params(**changes))
    assert refusal.value.param == param
    assert message in refusal.value.message


def test_a_model_that_reads_no_guidance_refuses_one_and_passes_zero():
    with pytest.raises(InvalidRequest, match="reads no guidance_scale"):
        limits(guided=False).settle(params(guidance_scale=3.5))
    assert limits(guided=False).settle(params(guidance_scale=0.0)).guidance_scale is None


def test_a_model_without_adapters_says_so():
    with pytest.raises(InvalidRequest, match="this model has none"):
        limits(lora_names=()).settle(params(loras=(LoraChoice(name="ink"),)))


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(4, 1.0, 0), (4, 0.6, 1), (4, 0.5, 2), (28, 0.6, 11), (10, 0.05, 9), (1, 0.3, 0), (50, 0.99, 0), (3, 1e-20, 3)],
)
def test_strength_says_which_of_the_steps_remain(steps, strength, first):
    assert first_step(steps, strength) == first


def test_an_edit_without_strength_takes_the_usual_one():
    wanted = limits().settle(params(init_image=b"png", num_inference_steps=10))
    assert (wanted.strength, wanted.first_step, wanted.num_steps) == (0.6, 4, 6)


def test_a_vae_that_shrinks_more_asks_for_larger_multiples():
    assert limits(vae_scale=16).multiple_of == 32
    assert limits(vae_scale=4).multiple_of == 16


def test_the_default_size_is_one_that_the_settings_allow():
    assert limits(max_pixels=600 * 600).default_size == 592
    assert limits(default_size=100).default_size == 96
    assert limits(default_size=3).default_size == 16
    with pytest.raises(LoadError, match="smallest picture, 16 x 16"):
        limits(max_pixels=255)


def test_the_contract_lets_pass_what_the_engine_paints_and_no_more():
    # The two packages know nothing of each other, so their limits stand in both.
    pairs = [
        (images.SIDE_STEP, engine_limits.MULTIPLE),
        (images.MAX_SIDE, engine_limits.MAX_SIDE),
        (images.MAX_PICTURES, engine_limits.MAX_PICTURES),
        (images.MAX_INFERENCE_STEPS, engine_limits.MAX_STEPS),
        (images.MAX_GUIDANCE, engine_limits.MAX_GUIDANCE),
        (images.MAX_LORAS, engine_limits.MAX_LORAS),
        (images.MAX_LORA_SCALE, engine_limits.MAX_LORA_SCALE),
        (images.DEFAULT_STRENGTH, engine_limits.DEFAULT_STRENGTH),
        (contract.MAX_SEED - images.MAX_PICTURES, engine_limits.MAX_SEED),
    ]
    assert [ours for ours, _ in pairs] == [theirs for _, theirs in pairs]


def test_limits_and_turns_need_no_torch():
    modules = "inferfleet.engine.diffusion.limits, inferfleet.engine.diffusion.turns"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
