"""From a spec to a FLUX pipeline in memory: transformer, VAE, encoders, adapters. Computes nothing with it.

The classes of the transformer and the VAE are diffusers'; they are built without memory and our own reader streams the
weights into them. The text encoders are ours, so that transformers is not needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inferfleet.engine.diffusion.components import Components, read_components
from inferfleet.engine.diffusion.fetching import find_pipeline
from inferfleet.engine.diffusion.filling import load_module, unchanged, wanted
from inferfleet.engine.diffusion.licence import Licence, read_licence
from inferfleet.engine.diffusion.offloading import load_encoder
from inferfleet.engine.diffusion.prompts import PromptEmbedder
from inferfleet.engine.diffusion.schedule import ScheduleConfig
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.diffusion.tokenizers import ClipTokenizer, T5Tokenizer
from inferfleet.engine.errors import LoadError
from inferfleet.engine.families import find_device
from inferfleet.engine.headers import StoredWeights, stored_weights
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel, WeightsMismatch
from inferfleet.engine.models.clip_text import ClipText
from inferfleet.engine.models.t5_encoder import T5Encoder
from inferfleet.engine.place import Place
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import commit_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from inferfleet.engine.diffusion.lora import LoraBank

#: Longest sequences that FLUX.1 schnell and dev were trained with.
UNGUIDED_LENGTH, GUIDED_LENGTH = 256, 512
#: The files' name of a number format -> what "auto" computes in.
AUTO_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Beginnings of names in the layout of the model's authors, which the hub has as a single file.
ORIGINAL_NAMES = ("double_blocks.", "single_blocks.", "model.diffusion_model.")


@dataclass
class Pipeline:
    """A pipeline ready to run, and what is known about it."""

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    schedule: ScheduleConfig
    prompts: PromptEmbedder
    loras: LoraBank
    licence: Licence
    #: Whether the transformer reads a guidance value: FLUX.1 dev and its like.
    guided: bool
    #: Of the T5 sequence, padding included; also the default.
    max_sequence_length: int
    #: Side of the picture that the model was trained for, in pixels.
    default_size: int
    latent_channels: int
    #: Pixels of a side that one latent stands for.
    vae_scale: int
    device: torch.device
    dtype: torch.dtype
    #: The hub commit that the folder holds, or None.
    commit: str | None
    folder: Path
    #: Seconds of each phase: find, build, read.
    load_seconds: dict[str, float]


def load_pipeline(spec: DiffusionSpec, progress: Progress) -> Pipeline:
    """Raises LoadError or one of the ModelErrors; each says what to do."""
    started = time.perf_counter()
    progress.begin("find")
    components = read_components(find_pipeline(spec, progress))
    licence = read_licence(components.folder, guided=components.guided)
    licence.refuse_unaccepted(spec.accept_licence)
    schedule = ScheduleConfig.from_json(components.scheduler)
    require_diffusers()
    dtype = compute_dtype(spec.dtype, stored_weights(components.checkpoints["transformer"].files))
    place = Place(dtype, find_device(spec.device), quantization=spec.quantization)
    found = time.perf_counter()
    encoders = _Encoders(components, spec, place)
    vae = build_vae(components.vae, dtype)
    built = time.perf_counter()
    progress.begin("read", encoders.num_bytes + components.num_bytes_of("transformer", "vae"))
    prompts = encoders.load(progress)
    transformer = _load_transformer(components, place, progress)
    with _named("vae"):
        load_module(vae, components.checkpoints["vae"], place.device, progress)
    loras = _load_loras(transformer, spec.loras, progress)
    read = time.perf_counter()
    seconds = {"find": found - started, "build": built - found, "read": read - built}
    return Pipeline(
        transformer=transformer,
        vae=vae,
        schedule=schedule,
        prompts=prompts,
        loras=loras,
        licence=licence,
        guided=components.guided,
        max_sequence_length=min(encoders.max_length, GUIDED_LENGTH if components.guided else UNGUIDED_LENGTH),
        default_size=components.default_size,
        latent_channels=components.latent_channels,
        vae_scale=components.vae_scale,
        device=place.device,
        dtype=dtype,
        commit=commit_of(components.folder),
        folder=components.folder,
        load_seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def require_diffusers() -> None:
    """LoadError that says what to install where it is missing."""
    missing = [name for name in ("diffusers", "PIL") if find_spec(name) is None]
    if missing:
        raise LoadError(f"image models need {' and '.join(missing)}: pip install 'inferfleet[image]'")


def compute_dtype(wanted: str, transformer: StoredWeights) -> torch.dtype:
    """The dtype to compute in: `wanted`, or for "auto" that of most of the transformer's numbers."""
    if wanted != "auto":
        return DTYPES[wanted]
    most = max(transformer.numbers, key=transformer.numbers.__getitem__, default="none")
    if most not in AUTO_DTYPES:
        raise UnsupportedModel(
            f"the transformer's weights are stored as {most}; this engine reads {', '.join(AUTO_DTYPES)} and codes"
            " them itself where quantization is set"
        )
    return AUTO_DTYPES[most]


def build_vae(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """An AutoencoderKL on the meta device. BadModelConfig for a config that diffusers cannot build."""
    from diffusers import AutoencoderKL

    known = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(known)
    except Exception as error:  # a wrong value may fail anywhere inside
        raise BadModelConfig(f"vae/config.json makes no AutoencoderKL: {error}") from error
    # torch's own cast: the class's would log a warning about weights that are to stay in float32, of which it has none.
    return nn.Module.to(vae, dtype=dtype).eval().requires_grad_(False)


class _Encoders:
    """Text encoders and tokenizers: built at once, read later."""

    def __init__(self, components: Components, spec: DiffusionSpec, place: Place) -> None:
        """Raises a ModelError for tokenizers and encoders that do not fit each other."""
        self._components, self._spec, self._device = components, spec, place.device
        self._clip = ClipText(components.text_encoder, dtype=place.dtype).eval()
        self._t5 = T5Encoder(components.text_encoder_2, dtype=place.dtype).eval()
        folder = components.folder
        self._clip_tokenizer = ClipTokenizer(folder / "tokenizer", self._clip.max_positions)
        self._t5_tokenizer = T5Tokenizer(folder / "tokenizer_2")
        for name, size, rows in (
            ("tokenizer", self._clip_tokenizer.vocab_size, self._clip.vocab_size),
            ("tokenizer_2", self._t5_tokenizer.vocab_size, self._t5.vocab_size),
        ):
            if size > rows:
                raise BadModelConfig(f"{name} has ids up to {size - 1}, but its encoder knows only {rows} tokens")

    @property
    def max_length(self) -> int:
        return self._t5_tokenizer.max_length

    @property
    def _offloaded(self) -> bool:
        return self._spec.encoders == "offloaded"

    @property
    def num_bytes(self) -> int:
        """What `load` reads."""
        stays_in_files = self._offloaded and self._device.type == "cpu"
        return 0 if stays_in_files else self._components.num_bytes_of("text_encoder", "text_encoder_2")

    def load(self, progress: Progress) -> PromptEmbedder:
        for name, encoder in (("text_encoder", self._clip), ("text_encoder_2", self._t5)):
            with _named(name):
                checkpoint = self._components.checkpoints[name]
                load_encoder(encoder, checkpoint, self._device, progress, offloaded=self._offloaded)
        return PromptEmbedder(
            self._clip,
            self._t5,
            self._clip_tokenizer,
            self._t5_tokenizer,
            self._device,
            cache_bytes=self._spec.prompt_cache_bytes,
            offloaded=self._offloaded,
        )


def _load_transformer(components: Components, place: Place, progress: Progress) -> FluxTransformer2DModel:
    from inferfleet.engine.diffusion.linears import load_transformer

    with components.checkpoints["transformer"].by_name() as tensors, _named("transformer"):
        if any(name.startswith(ORIGINAL_NAMES) for name in tensors):
            raise UnsupportedModel(
                f"{components.folder / 'transformer'} has the names of the authors' single file; take the repository's"
                " transformer folder in diffusers' layout"
            )
        return load_transformer(components.transformer, progress.counted(wanted(tensors, unchanged)), place)


def _load_loras(transformer: Any, loras: Mapping[str, str], progress: Progress) -> LoraBank:
    from inferfleet.engine.diffusion.lora import load_loras

    return load_loras(transformer, loras, progress)


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Puts the component's name before those of the tensors that do not fit."""
    try:
        yield
    except WeightsMismatch as error:
        kinds = (error.missing, error.extra, error.misshapen)
        raise WeightsMismatch(*([f"{component}/{name}" for name in names] for names in kinds)) from error
