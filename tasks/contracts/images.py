"""The bodies of image jobs: OpenAI's fields, FLUX's parameters, the queue's options. Knows no model."""

import base64
import binascii
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts.contract import (
    MAX_SEED,
    Contract,
    ModelName,
    QueueOptions,
    User,
    refused,
    served,
    validated,
)
from inferfleet.tasks.picture_header import NoPicture, PictureHeader, read_header

MAX_PROMPT_CHARS = 10_000
MAX_PICTURES = 10
#: A side of a picture is a multiple of this: the VAE's factor 8, times the transformer's patches of 2.
SIDE_STEP = 16
MAX_SIDE = 4096
MAX_PIXELS = 1 << 22
MAX_INFERENCE_STEPS = 100
MAX_GUIDANCE = 30
MAX_PROMPT_TOKENS = 512
MAX_LORAS = 4
MAX_LORA_SCALE = 2
#: Of the picture that an edit starts from: bytes of its file, pixels of a side and in all.
MAX_INIT_BYTES = 20 << 20
MAX_INIT_SIDE = 8192
MAX_INIT_PIXELS = 40_000_000
DEFAULT_STRENGTH = 0.6
#: Of a data URL: the base64 of MAX_INIT_BYTES and what stands before it.
MAX_INIT_CHARS = 4 * ((MAX_INIT_BYTES + 2) // 3) + 64

DATA_URL = re.compile(r"data:(image/(?:png|jpeg|webp));base64,")
SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")

#: OpenAI's fields that nothing here answers to: the values that change nothing, and what to use instead of others.
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quality": (("auto",), "use num_inference_steps"),
    "style": ((), "describe the style in the prompt"),
    "background": (("auto", "opaque"), "pictures are opaque"),
    "moderation": (("auto",), "nothing is moderated here"),
    "mask": ((), "a whole picture is changed: use image and strength"),
    "stream": ((False,), "submit a job and follow its events, with preview_every for pictures on the way"),
    "partial_images": ((0,), "use preview_every"),
    "input_fidelity": ((), "use strength"),
}

Side = Annotated[int, Field(ge=SIDE_STEP, le=MAX_SIDE, multiple_of=SIDE_STEP)]
OutputFormat = Literal["png", "jpeg", "webp"]


class Lora(Contract):
    """An adapter of the model's settings, and how much of it."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    scale: Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] = 1.0


class ImageRequest(QueueOptions):
    """What both image bodies share. None = the model's own default, where the field says no other."""

    model: ModelName
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    #: Pictures; the i-th, counted from 0, is made from seed + i.
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    #: "WIDTHxHEIGHT", or "auto" for the model's default. Instead of width and height.
    size: Annotated[str, Field(max_length=16)] | None = Field(
        default=None, json_schema_extra={"pattern": f"^(auto|{SIZE.pattern})$"}
    )
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_INFERENCE_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED - MAX_PICTURES)] | None = None
    #: None = png.
    output_format: OutputFormat | None = None
    #: Quality of jpeg and webp.
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    #: None = url.
    response_format: Literal["url", "b64_json"] | None = None
    #: Tokens of the prompt that the long encoder reads.
    max_sequence_length: Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)] | None = None
    loras: Annotated[list[Lora], Field(max_length=MAX_LORAS)] | None = None
    #: A small picture of how it stands, as an event of the job, after every so many steps.
    preview_every: Annotated[int, Field(ge=1, le=MAX_INFERENCE_STEPS)] | None = None
    #: Write the prompt's text into a PNG's metadata, and not only its SHA-256.
    embed_prompt: bool | None = None
    user: User | None = None

    #: What of the body goes to the engine under the same name.
    ENGINE_FIELDS: ClassVar[tuple[str, ...]] = (
        "prompt", "n", "num_inference_steps", "guidance_scale", "seed", "output_format", "output_compression",
        "max_sequence_length", "preview_every", "embed_prompt",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def refuse_unserved(cls, body: Any) -> Any:
        return served(body, UNSERVED)

    @field_validator("size")
    @classmethod
    def is_a_size(cls, size: str | None) -> str | None:
        if size in (None, "auto"):
            return size
        sides = SIZE.fullmatch(size or "")
        if not sides:
            raise refused('size is "auto" or "WIDTHxHEIGHT", like "1024x768"')
        for side in map(int, sides.groups()):
            if side % SIDE_STEP or not SIDE_STEP <= side <= MAX_SIDE:
                raise refused(f"size: each side is a multiple of {SIDE_STEP} between {SIDE_STEP} and {MAX_SIDE}")
        return size

    @field_validator("loras")
    @classmethod
    def named_once(cls, loras: list[Lora] | None) -> list[Lora] | None:
        if len({lora.name for lora in loras or ()}) < len(loras or ()):
            raise refused("loras names one adapter twice")
        return loras

    @model_validator(mode="after")
    def fields_agree(self) -> "ImageRequest":
        if self.size is not None and (self.width is not None or self.height is not None):
            raise refused("give size, or width and height, not both", "size")
        if (self.width is None) != (self.height is None):
            raise refused("give width and height together", "height" if self.height is None else "width")
        if (sides := self.sides) is not None and sides[0] * sides[1] > MAX_PIXELS:
            raise refused(f"width * height must be at most {MAX_PIXELS}", "width" if self.size is None else "size")
        if self.output_compression is not None and self.output_format not in ("jpeg", "webp"):
            raise refused("output_compression needs output_format jpeg or webp", "output_compression")
        return self

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height; None = the model's default."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        if self.size in (None, "auto"):
            return None
        width, _, height = str(self.size).partition("x")
        return int(width), int(height)

    def painting(self) -> dict[str, Any]:
        """What was given of the engine's ImageParams, but for the init image."""
        values = {name: getattr(self, name) for name in self.ENGINE_FIELDS}
        values["width"], values["height"] = self.sides or (None, None)
        values["loras"] = [lora.model_dump() for lora in self.loras] if self.loras else None
        return {name: value for name, value in values.items() if value is not None}


class ImageGenerationRequest(ImageRequest):
    """The body of POST /v1/images/generations."""


class ImageEditRequest(ImageRequest):
    """The body of POST /v1/images/edits: a picture that the new one starts from."""

    #: data:image/png;base64,... (or jpeg, webp). It is scaled and cut at its centre to the new picture's size.
    image: Annotated[str, Field(max_length=MAX_INIT_CHARS, json_schema_extra={"pattern": f"^{DATA_URL.pattern}"})]
    #: How much of it is replaced.
    strength: Annotated[float, Field(gt=0, le=1)] = DEFAULT_STRENGTH

    @field_validator("image")
    @classmethod
    def is_a_picture(cls, image: str) -> str:
        claimed = DATA_URL.match(image)
        if not claimed:
            raise refused("image is a data URL: data:image/png;base64,... (or jpeg, webp)")
        check_init_image(decoded(image), claimed[1])
        return image

    @property
    def init_image(self) -> bytes:
        """The file inside the data URL."""
        return decoded(self.image)

    def painting(self) -> dict[str, Any]:
        return super().painting() | {"strength": self.strength}


def decoded(image: str) -> bytes:
    """The file inside a data URL, its base64 read strictly. Raises a complaint that pydantic understands."""
    try:
        return base64.b64decode(image[image.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"image: its base64 is damaged: {error}") from None


def check_init_image(data: bytes, claimed: str) -> PictureHeader:
    """Bytes, kind and size of the picture that an edit starts from, by its header."""
    if len(data) > MAX_INIT_BYTES:
        raise refused(f"image: the picture has {len(data)} bytes, the limit is {MAX_INIT_BYTES}")
    try:
        header = read_header(data)
    except NoPicture as error:
        raise refused(f"image: {error}") from None
    if header.content_type != claimed:
        raise refused(f"image: the data URL says {claimed}, its bytes are {header.content_type}")
    if max(header.width, header.height) > MAX_INIT_SIDE or header.width * header.height > MAX_INIT_PIXELS:
        raise refused(
            f"image: {header.width} x {header.height} pixels are too many: at most {MAX_INIT_SIDE} a side and "
            f"{MAX_INIT_PIXELS} in all"
        )
    return header


def data_url(data: bytes, content_type: str) -> str:
    """A file as the `image` of an edit."""
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def parse_images(raw: bytes) -> ImageGenerationRequest:
    """Bytes of a generations body -> request. InvalidJSON (400) or InvalidRequest (422) with `param` = dotted path."""
    return validated(ImageGenerationRequest, strict_json.loads(raw))


def parse_edit(raw: bytes) -> ImageEditRequest:
    """Bytes of an edits body, JSON with a data URL -> request. Errors as in parse_images."""
    return validated(ImageEditRequest, strict_json.loads(raw))
