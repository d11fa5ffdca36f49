"""What a picture is asked for with. Knows no model: `limits.py` compares it with one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChoice:
    """An adapter of the engine's settings, and how much of it."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageParams:
    """One request: n pictures of one prompt, the i-th from seed + i.

    None = the model's own default (width, height, steps, guidance, sequence length).
    """

    prompt: str
    seed: int
    width: int | None = None
    height: int | None = None
    n: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    #: Tokens of the prompt that the long encoder reads, padding included.
    max_sequence_length: int | None = None
    #: A PNG of the size of the picture, from which it starts instead of from noise alone.
    init_image: bytes | None = None
    #: How much of the init image is replaced: 0 < strength <= 1. Only with init_image.
    strength: float | None = None
    loras: tuple[LoraChoice, ...] = ()
    output_format: OutputFormat = "png"
    #: Quality of jpeg and webp, 0 to 100.
    output_compression: int | None = None
    #: A small picture of how it stands every so many steps; None = never.
    preview_every: int | None = None
    #: Write the prompt's text into the PNG; without it only its SHA-256.
    embed_prompt: bool = False
