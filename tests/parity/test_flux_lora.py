"""LoRA adapters against diffusers' FluxPipeline with its weights changed by hand: W + scale * alpha / r * B @ A."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lora_adapters import Made, merge, write_diffusers, write_original, write_peft
from parity.checkpoints.flux import SHAPES, reference, write
from parity.device import DEVICE
from torch import Tensor

from inferfleet.engine.diffusion.latents import pack
from inferfleet.engine.diffusion.linears import load_transformer
from inferfleet.engine.diffusion.lora import load_loras
from inferfleet.engine.diffusion.offline import ImageGenerator
from inferfleet.engine.diffusion.params import ImageParams, LoraChoice
from inferfleet.engine.place import Place

FORMATS = ("peft", "peft-patterns", "diffusers", "diffusers-alpha", "kohya", "comfyui", "xlabs")


def written(form: str, folder, transformer, seed: int) -> Made:
    match form:
        case "peft":
            return write_peft(folder, transformer, seed)
        case "peft-patterns":
            ranks, alphas = {"to_q": 3, "proj_mlp": 7}, {"attn.to_k": 9, "x_embedder": 1}
            return write_peft(folder, transformer, seed, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
        case "diffusers":
            return write_diffusers(folder / "one.safetensors", transformer, seed)
        case "diffusers-alpha":
            return write_diffusers(folder / "one.safetensors", transformer, seed, alpha=2.5, only="attn")
    return write_original(folder / "one.safetensors", transformer, seed, form)


def latents(pipeline, seed: int, prompt: str = "a red circle on blue") -> Tensor:
    settings: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 96, "max_sequence_length": 16}
    random = torch.Generator("cpu").manual_seed(seed)
    return pipeline(prompt, guidance_scale=3.0, generator=random, output_type="latent", **settings).images


def with_ours(pipeline, config, quantization=None):
    """The same pipeline around our transformer."""
    place = Place(torch.float32, torch.device("cpu"), quantization=quantization)
    ours = load_transformer(config, iter(pipeline.transformer.state_dict().items()), place)
    other = type(pipeline)(**pipeline.components | {"transformer": ours})
    other.set_progress_bar_config(disable=True)
    return other, ours


@pytest.mark.parametrize(
    ("form", "seed"),
    [
        pytest.param(form, seed, marks=[] if number % len(SHAPES) == seed else [pytest.mark.slow])
        for number, form in enumerate(FORMATS)
        for seed in range(len(SHAPES))
    ],
)
def test_an_adapter_in_every_format_paints_what_the_merged_weights_paint(form, seed, tmp_path):
    # Given a pipeline and an adapter for all that its format can name,
    write(tmp_path / "model", seed)
    judge = reference(tmp_path / "model")
    config = json.loads((tmp_path / "model/transformer/config.json").read_text())
    made = written(form, tmp_path, judge.transformer, seed)
    pipeline, ours = with_ours(judge, config)
    bank = load_loras(ours, {"mine": str(made.path)})
    plain = latents(judge, seed)
    assert (latents(pipeline, seed) - plain).abs().max() < 1e-4
    # when it is chosen with a scale, then the latents are those of the merged weights, and others than without it.
    bank.select([[LoraChoice(name="mine", scale=0.7)]])
    found = latents(pipeline, seed)
    merge(judge.transformer, made.changes, 0.7)
    expected = latents(judge, seed)
    assert (found - expected).abs().max() < 1e-4
    assert (expected - plain).abs().max() > 0.01
    # And without it they are the old ones.
    bank.select([[]])
    assert (latents(pipeline, seed) - plain).abs().max() < 1e-4


def test_two_adapters_at_once_are_the_sum_of_their_changes(tmp_path):
    write(tmp_path / "model", 1)
    judge = reference(tmp_path / "model")
    config = json.loads((tmp_path / "model/transformer/config.json").read_text())
    first = write_peft(tmp_path / "first", judge.transformer, 1)
    second = write_original(tmp_path / "second.safetensors", judge.transformer, 2, "kohya")
    pipeline, ours = with_ours(judge, config)
    bank = load_loras(ours, {"first": str(first.path.parent), "second": str(second.path)})
    bank.select([[LoraChoice(name="second", scale=-0.5), LoraChoice(name="first", scale=0.3)]])
    merge(judge.transformer, first.changes, 0.3)
    merge(judge.transformer, second.changes, -0.5)
    assert (latents(pipeline, 3) - latents(judge, 3)).abs().max() < 1e-4


def test_pictures_with_unlike_adapters_in_one_batch_are_each_those_of_their_own_merged_pipeline(tmp_path):
    # Given an engine with two adapters,
    write(tmp_path / "model", 0)
    plain = reference(tmp_path / "model")
    ink = write_peft(tmp_path / "ink", plain.transformer, 1)
    wax = write_original(tmp_path / "wax.safetensors", plain.transformer, 2, "kohya")
    painter = ImageGenerator(
        str(tmp_path / "model"), device=str(DEVICE), loras={"ink": str(ink.path.parent), "wax": str(wax.path)}
    )
    # when three requests with other choices share their steps,
    sizes = {"width": 96, "height": 64, "num_inference_steps": 3, "max_sequence_length": 16}
    choices: list[dict[str, float]] = [{"ink": 0.7}, {}, {"wax": -0.5, "ink": 0.2}]
    found: dict[str, Tensor] = {}
    painter.engine.on_latents = lambda name, _, latents: found.update({name: latents})
    for number, chosen in enumerate(choices):
        loras = tuple(LoraChoice(name=name, scale=scale) for name, scale in chosen.items())
        painter.engine.add(str(number), ImageParams(prompt="a red circle on blue", seed=number, loras=loras, **sizes))
    batches = set()
    while painter.engine.has_work:
        batches.add(painter.engine.step().batch_size)
    assert 3 in batches
    # then each has the latents of a pipeline into whose weights its own choice has been merged.
    for number, chosen in enumerate(choices):
        judge = reference(tmp_path / "model")
        for name, scale in chosen.items():
            merge(judge.transformer, {"ink": ink, "wax": wax}[name].changes, scale)
        expected = latents(judge, number)
        assert (pack(found[str(number)]).cpu() - expected).abs().max() < 1e-4
