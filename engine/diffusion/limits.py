"""What a model paints and what not: a request's parameters against its limits, and its defaults filled in. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from inferfleet.engine.diffusion.params import ImageParams, LoraChoice, OutputFormat
from inferfleet.engine.errors import InvalidRequest, LoadError

#: Sides of a picture are multiples of this many pixels, or of what the VAE needs if that is more.
MULTIPLE = 16
MAX_SIDE = 4096
MAX_PICTURES = 10
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_LORAS = 4
MAX_LORA_SCALE = 2.0
#: Picture i is made from seed + i.
MAX_SEED = 2**63 - 1 - MAX_PICTURES
#: Bytes of a prompt as JSON: EXIF in a JPEG ends at 65,533, and other facts are in it.
MAX_JPEG_PROMPT = 60_000
#: As OpenAI's edits have none, and FLUX's own pipelines use.
DEFAULT_STRENGTH = 0.6
#: As the cards of FLUX.1 schnell and dev say.
UNGUIDED_STEPS, GUIDED_STEPS = 4, 28
DEFAULT_GUIDANCE = 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request whose every field has a value that the model can serve."""

    prompt: str
    seed: int
    width: int
    height: int
    n: int
    num_inference_steps: int
    #: Steps that an edit leaves out; 0 where a picture starts from noise alone.
    first_step: int
    #: None: the model reads none.
    guidance_scale: float | None
    max_sequence_length: int
    #: None without an init image.
    strength: float | None
    loras: tuple[LoraChoice, ...]
    output_format: OutputFormat
    output_compression: int | None
    preview_every: int | None
    embed_prompt: bool

    @property
    def num_steps(self) -> int:
        """Steps that each picture takes."""
        return self.num_inference_steps - self.first_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one loaded model. All sizes in pixels."""

    guided: bool
    #: Tokens of the long encoder at most, and by default.
    max_sequence_length: int
    default_size: int
    max_pixels: int
    multiple_of: int
    lora_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        guided: bool,
        max_sequence_length: int,
        default_size: int,
        max_pixels: int,
        vae_scale: int,
        lora_names: Sequence[str] = (),
    ) -> Limits:
        """default_size: the model's; smaller here if max_pixels is. LoadError if no picture has so few pixels."""
        multiple = math.lcm(MULTIPLE, 2 * vae_scale)
        if max_pixels < multiple**2:
            raise LoadError(
                f"max_pixels is {max_pixels}, less than the smallest picture, {multiple} x {multiple}",
                param="max_pixels",
            )
        side = min(default_size, math.isqrt(max_pixels), MAX_SIDE)
        return cls(
            guided=guided,
            max_sequence_length=max_sequence_length,
            default_size=max(multiple, side // multiple * multiple),
            max_pixels=max_pixels,
            multiple_of=multiple,
            lora_names=tuple(lora_names),
        )

    @property
    def default_steps(self) -> int:
        return GUIDED_STEPS if self.guided else UNGUIDED_STEPS

    @property
    def default_guidance(self) -> float | None:
        return DEFAULT_GUIDANCE if self.guided else None

    def settle(self, params: ImageParams) -> Wanted:
        """The request with its defaults. InvalidRequest names the field and its limit."""
        if not isinstance(params.prompt, str) or not params.prompt:
            raise InvalidRequest("prompt must be a text of at least 1 character", param="prompt")
        width, height = self._size(params)
        steps = _whole("num_inference_steps", params.num_inference_steps, self.default_steps, 1, MAX_STEPS)
        strength = _strength(params)
        first = 0 if strength is None else first_step(steps, strength)
        if first >= steps:
            raise InvalidRequest(f"strength {strength} leaves none of {steps} steps", param="strength")
        longest = self.max_sequence_length
        return Wanted(
            prompt=params.prompt,
            seed=_whole("seed", params.seed, 0, 0, MAX_SEED),
            width=width,
            height=height,
            n=_whole("n", params.n, 1, 1, MAX_PICTURES),
            num_inference_steps=steps,
            first_step=first,
            guidance_scale=self._guidance(params.guidance_scale),
            max_sequence_length=_whole("max_sequence_length", params.max_sequence_length, longest, 1, longest),
            strength=strength,
            loras=self._loras(params.loras),
            output_format=_format(params),
            output_compression=_compression(params),
            preview_every=_preview(params.preview_every),
            embed_prompt=_embed(params),
        )

    def _size(self, params: ImageParams) -> tuple[int, int]:
        if params.width is None and params.height is None:
            return self.default_size, self.default_size
        for name, value in (("width", params.width), ("height", params.height)):
            if value is None:
                raise InvalidRequest(f"{name} is missing: give both width and height, or neither", param=name)
            side = _whole(name, value, 0, self.multiple_of, MAX_SIDE)
            if side % self.multiple_of:
                raise InvalidRequest(f"{name} must be a multiple of {self.multiple_of}, not {side}", param=name)
        assert params.width is not None and params.height is not None
        if params.width * params.height > self.max_pixels:
            raise InvalidRequest(
                f"{params.width} x {params.height} are {params.width * params.height} pixels; this model paints at"
                f" most {self.max_pixels}",
                param="width",
            )
        return params.width, params.height

    def _guidance(self, value: float | None) -> float | None:
        if not self.guided:
            if value:
                raise InvalidRequest(
                    "this model reads no guidance_scale: leave it out, or say 0", param="guidance_scale"
                )
            return None
        return DEFAULT_GUIDANCE if value is None else _number("guidance_scale", value, 0, MAX_GUIDANCE)

    def _loras(self, choices: Sequence[LoraChoice]) -> tuple[LoraChoice, ...]:
        if len(choices) > MAX_LORAS:
            raise InvalidRequest(f"loras has {len(choices)} entries; at most {MAX_LORAS} are allowed", param="loras")
        seen: set[str] = set()
        for choice in choices:
            if choice.name not in self.lora_names:
                known = ", ".join(self.lora_names) or "none"
                raise InvalidRequest(f"there is no LoRA adapter {choice.name!r}; this model has {known}", param="loras")
            if choice.name in seen:
                raise InvalidRequest(f"the LoRA adapter {choice.name!r} is named twice", param="loras")
            seen.add(choice.name)
            _number("loras", choice.scale, -MAX_LORA_SCALE, MAX_LORA_SCALE, f"the scale of {choice.name!r}")
        return tuple(choices)


def first_step(num_steps: int, strength: float) -> int:
    """Which of num_steps steps an edit begins with: strength says what share of them, the last ones, is taken.

    num_steps itself, so that none is left, only for a strength that vanishes beside 1.
    """
    return int(max(num_steps - min(num_steps * strength, num_steps), 0))


def _strength(params: ImageParams) -> float | None:
    if params.init_image is None:
        if params.strength is not None:
            raise InvalidRequest("strength needs an init image", param="strength")
        return None
    if params.strength is None:
        return DEFAULT_STRENGTH
    strength = _number("strength", params.strength, 0, 1)
    if strength == 0:
        raise InvalidRequest("strength must be above 0 and at most 1, not 0", param="strength")
    return strength


def _format(params: ImageParams) -> OutputFormat:
    if params.output_format not in get_args(OutputFormat):
        known = ", ".join(get_args(OutputFormat))
        raise InvalidRequest(
            f"output_format must be one of {known}, not {params.output_format!r}", param="output_format"
        )
    return params.output_format


def _compression(params: ImageParams) -> int | None:
    if params.output_compression is None:
        return None
    if params.output_format == "png":
        raise InvalidRequest("output_compression is for jpeg and webp; png loses nothing", param="output_compression")
    return _whole("output_compression", params.output_compression, 0, 0, 100)


def _preview(value: int | None) -> int | None:
    return None if value is None else _whole("preview_every", value, 0, 1, MAX_STEPS)


def _embed(params: ImageParams) -> bool:
    if not isinstance(params.embed_prompt, bool):
        raise InvalidRequest(f"embed_prompt must be true or false, not {params.embed_prompt!r}", param="embed_prompt")
    if params.embed_prompt and params.output_format == "jpeg" and len(json.dumps(params.prompt)) > MAX_JPEG_PROMPT:
        raise InvalidRequest(
            f"the prompt takes more than the {MAX_JPEG_PROMPT} bytes that a JPEG's metadata has room for: leave"
            " embed_prompt out, or take png or webp",
            param="embed_prompt",
        )
    return params.embed_prompt


def _whole(name: str, value: int | None, default: int, least: int, most: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}", param=name)
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be {least} to {most}, not {value}", param=name)
    return value


def _number(param: str, value: float, least: float, most: float, name: str | None = None) -> float:
    name = name or param
    # A whole number may be too large for a float, so the range comes first; NaN is within none.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be a number from {least:g} to {most:g}, not {value!r}", param=param)
    return float(value)
