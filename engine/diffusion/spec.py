"""Which image model to run and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inferfleet.engine.errors import LoadError
from inferfleet.engine.spec_checks import check_counts, check_quantization, refuse_unknown
from inferfleet.kernels.quantized import Kind

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
        check_counts(self, ("max_batch_size", "max_pixels", "vae_tiling_pixels"), optional=("threads",))
        check_counts(self, ("prompt_cache_bytes",), least=0)
        check_quantization(self.quantization)
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
        refuse_unknown(cls, values, "an image model")
        return cls(**values)
