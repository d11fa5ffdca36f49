"""Which image model to run and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from inferfleet.engine.errors import LoadError
from inferfleet.kernels.quantized import KINDS, Kind

#: "auto" is the checkpoint's own, but never float16, which FLUX's larger numbers leave.
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Settings that an image model shares with text models.
SHARED = ("path", "revision", "dtype", "device", "quantization", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionSpec:
    """A pipeline folder and its settings. LoadError names a field outside its limits."""

    #: A folder in diffusers' layout, or a hub id.
    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    #: "int8", "int4" or "fp8": what the transformer's linear layers become while they are read.
    quantization: Kind | None = None
    threads: int | None = None
    #: Pictures that share one step of the transformer.
    max_batch_size: int = 8
    #: Largest width * height of a picture.
    max_pixels: int = 2048 * 2048
    #: "resident": text encoders stay on the device. "offloaded": each of their parts comes when a new prompt needs it
    #: and leaves at once, from the host's memory to a GPU, from the files to a CPU.
    encoders: Literal["resident", "offloaded"] = "resident"
    #: Bytes of prompt embeddings that are kept for jobs with the same prompt.
    prompt_cache_bytes: int = 256 << 20
    #: Pictures of more pixels than this are decoded in tiles.
    vae_tiling_pixels: int = 1536 * 1536
    #: Name -> folder, file or hub id of a LoRA adapter for the transformer; jobs choose among them.
    loras: Mapping[str, str] = field(default_factory=dict)
    #: The licence tag that the operator accepts, where the model's licence has to be.
    accept_licence: str | None = None
    #: A quantised transformer whose pictures are further from full precision than so many dB is refused ...
    min_psnr: float = 25.0
    #: ... unless the operator allows it.
    allow_low_psnr: bool = False

    def __post_init__(self) -> None:
        least = {"threads": 1, "max_batch_size": 1, "max_pixels": 1, "vae_tiling_pixels": 1, "prompt_cache_bytes": 0}
        for name, limit in least.items():
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= limit
            if not is_count and not (name == "threads" and value is None):
                raise LoadError(f"{name} must be a whole number of at least {limit}, not {value!r}", param=name)
        if self.quantization not in (None, *KINDS):
            raise LoadError(
                f"quantization must be one of {', '.join(KINDS)}, not {self.quantization!r}", param="quantization"
            )
        if (
            isinstance(self.min_psnr, bool)
            or not isinstance(self.min_psnr, int | float)
            or not 0 <= self.min_psnr < 100
        ):
            raise LoadError(f"min_psnr must be a number of dB from 0 to 100, not {self.min_psnr!r}", param="min_psnr")
        if not isinstance(self.allow_low_psnr, bool):
            raise LoadError(
                f"allow_low_psnr must be true or false, not {self.allow_low_psnr!r}", param="allow_low_psnr"
            )
        if self.encoders not in ("resident", "offloaded"):
            raise LoadError(f"encoders must be resident or offloaded, not {self.encoders!r}", param="encoders")
        if self.dtype not in DTYPES:
            raise LoadError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}", param="dtype")
        if not isinstance(self.loras, Mapping) or not all(
            isinstance(at, str) for pair in self.loras.items() for at in pair
        ):
            raise LoadError(f"loras must map names to folders, files or hub ids, not {self.loras!r}", param="loras")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionSpec:
        """LoadError for an unknown field."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise LoadError(f"{unknown[0]} is not a setting of an image model", param=unknown[0])
        return cls(**values)
