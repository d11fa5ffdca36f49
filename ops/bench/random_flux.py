"""FLUX pipelines of random weights for a bench: ours without any file, and the same numbers in diffusers' own pipeline.

Nothing is written to disk, so that the published shape (24 GB in bfloat16) can be timed on a machine without room for
it. Prompts are embedded by nobody: their embeddings are random too, because encoders cost a hundredth of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from inferfleet.engine.diffusion.licence import Licence
from inferfleet.engine.diffusion.linears import load_transformer
from inferfleet.engine.diffusion.lora import LoraBank
from inferfleet.engine.diffusion.pipeline import Pipeline
from inferfleet.engine.diffusion.prompts import Embeddings
from inferfleet.engine.diffusion.schedule import ScheduleConfig
from inferfleet.engine.place import Place


@dataclass(frozen=True)
class Shape:
    """Sizes of a pipeline; joint and pooled are the encoders' hidden sizes."""

    layers: int
    single_layers: int
    heads: int
    head_size: int
    axes: tuple[int, int, int]
    vae: tuple[int, ...]
    guided: bool
    joint: int = 4096
    pooled: int = 768
    latent_channels: int = 16

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def steps(self) -> int:
        """What a picture takes by default."""
        return 28 if self.guided else 4

    @property
    def sequence(self) -> int:
        """Tokens of the prompt, padding included."""
        return 512 if self.guided else 256

    def transformer(self) -> dict[str, Any]:
        return {
            "patch_size": 1,
            "in_channels": 4 * self.latent_channels,
            "num_layers": self.layers,
            "num_single_layers": self.single_layers,
            "attention_head_dim": self.head_size,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint,
            "pooled_projection_dim": self.pooled,
            "guidance_embeds": self.guided,
            "axes_dims_rope": list(self.axes),
        }

    def flops(self, image_tokens: int) -> float:
        """Operations of one step for one picture: products of the blocks, and attention.

        A double block has 12 width^2 weights for each stream of tokens, a single block 12 width^2 for all of them
        (modulations and what surrounds the blocks are computed once a picture and left out).
        """
        tokens, blocks = image_tokens + self.sequence, self.layers + self.single_layers
        return blocks * (24 * self.width**2 * tokens + 4 * tokens**2 * self.width)


SHAPES = {
    # About 100 M parameters, for CPUs.
    "small": Shape(2, 6, 12, 64, (8, 28, 28), (32, 64, 64, 64), guided=False),
    "small-dev": Shape(2, 6, 12, 64, (8, 28, 28), (32, 64, 64, 64), guided=True),
    # What black-forest-labs published: 11.9 G parameters.
    "schnell": Shape(19, 38, 24, 128, (16, 56, 56), (128, 256, 512, 512), guided=False),
    "dev": Shape(19, 38, 24, 128, (16, 56, 56), (128, 256, 512, 512), guided=True),
    # Next to nothing, to see that the bench itself works.
    "tiny": Shape(1, 1, 2, 16, (4, 6, 6), (8, 8, 8, 8), guided=False, joint=32, pooled=24),
}


@dataclass
class RandomPrompts:
    """Stands where PromptEmbedder does. A prompt's embeddings are made once and depend on its text alone."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    known: dict[tuple[str, int], Embeddings] = field(default_factory=dict)

    def count(self, prompt: str) -> int:
        return len(prompt.split()) + 1

    def embed(self, prompt: str, max_sequence_length: int) -> Embeddings:
        key = (prompt, max_sequence_length)
        if key not in self.known:
            generator = torch.Generator().manual_seed(sum(prompt.encode()))
            t5 = torch.randn(max_sequence_length, self.shape.joint, generator=generator)
            pooled = torch.randn(self.shape.pooled, generator=generator)
            t5, pooled = (part.to(self.device, self.dtype) for part in (t5, pooled))
            self.known[key] = Embeddings(t5, pooled, self.count(prompt))
        return self.known[key]

    def stats(self) -> dict[str, int]:
        return {}


def scheduler(shape: Shape) -> dict[str, Any]:
    """As the published scheduler_config.json of schnell or dev."""
    return {"num_train_timesteps": 1000, "shift": 3.0 if shape.guided else 1.0, "use_dynamic_shifting": shape.guided}


def weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the transformer under diffusers' name, made on the device, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in _skeleton(shape).named_parameters():
        if parameter.ndim == 1:
            value = torch.ones if "norm" in name else torch.zeros
            yield name, value(parameter.shape, dtype=dtype, device=device)
        else:
            scale = parameter.shape[-1] ** -0.5
            value = torch.randn(parameter.shape, generator=generator, device=device, dtype=dtype)
            yield name, value.mul_(scale)


def num_parameters(shape: Shape) -> int:
    return sum(parameter.numel() for parameter in _skeleton(shape).parameters())


def _skeleton(shape: Shape) -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel(**shape.transformer())


def vae(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    levels = len(shape.vae)
    with torch.device(device):
        made = AutoencoderKL(
            block_out_channels=shape.vae,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=shape.latent_channels,
            norm_num_groups=min(32, shape.vae[0]),
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    return nn.Module.to(made, dtype=dtype).eval().requires_grad_(False)


def pipeline(shape: Shape, place: Place) -> Pipeline:
    """Ours."""
    transformer = load_transformer(shape.transformer(), weights(shape, place.dtype, place.device), place)
    return Pipeline(
        transformer=transformer,
        vae=vae(shape, place.dtype, place.device),
        schedule=ScheduleConfig.from_json(scheduler(shape)),
        prompts=RandomPrompts(shape, place.dtype, place.device),  # type: ignore[arg-type]
        loras=LoraBank(transformer),
        licence=Licence("apache-2.0", "", needs_acceptance=False),
        guided=shape.guided,
        max_sequence_length=shape.sequence,
        default_size=1024,
        latent_channels=shape.latent_channels,
        vae_scale=2 ** (len(shape.vae) - 1),
        device=place.device,
        dtype=place.dtype,
        commit=None,
        folder=Path(),
        load_seconds={},
    )


def theirs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' own pipeline with the same numbers. ImportError where transformers, which it wants, is missing."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    # In place of parameters without memory: a GPU would not hold those of the published shape in float32 as well.
    transformer = _skeleton(shape).eval().requires_grad_(False)
    transformer.load_state_dict(dict(weights(shape, dtype, device)), assign=True)
    whole = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler(shape)),
        vae=vae(shape, dtype, device),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    whole.set_progress_bar_config(disable=True)
    return whole
