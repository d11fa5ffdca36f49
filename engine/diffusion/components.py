"""Reads a pipeline folder's configuration files and says whether this engine runs such a pipeline. Opens no weights.

model_index.json names the components, each a folder with its own configuration: transformer, vae, text_encoder (CLIP),
text_encoder_2 (T5), tokenizer, tokenizer_2, scheduler. What they have to agree on is compared here, before gigabytes
are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inferfleet.engine.config import Fields, read_json
from inferfleet.engine.hub import PIPELINE_INDEX as MODEL_INDEX
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel
from inferfleet.engine.weights import Checkpoint

PIPELINE = "FluxPipeline"
#: Component -> (library, classes) that model_index.json may name for it.
CLASSES = {
    "transformer": ("diffusers", ("FluxTransformer2DModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "text_encoder_2": ("transformers", ("T5EncoderModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "tokenizer_2": ("transformers", ("T5TokenizerFast", "T5Tokenizer")),
    "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
}
#: Component with weights -> the stem of its files' names.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
#: Sides are multiples of 16: the VAE's scale, and 2 x 2 latents that are one token of the transformer.
MOST_VAE_LEVELS = 4
#: No published VAE is nearly so wide; a damaged configuration may claim anything.
MOST_CHANNELS = 1 << 14


def is_pipeline(folder: Path) -> bool:
    """Whether a model's folder holds a pipeline of components instead of one language model."""
    return (folder / MODEL_INDEX).is_file()


@dataclass(frozen=True)
class Components:
    """Configuration of a FLUX pipeline that this engine runs."""

    folder: Path
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    @property
    def guided(self) -> bool:
        """Whether the transformer reads a guidance value: FLUX.1 dev and its like."""
        return bool(self.transformer.get("guidance_embeds", False))

    @property
    def latent_channels(self) -> int:
        return int(self.vae["latent_channels"])

    @property
    def vae_scale(self) -> int:
        """Pixels of a side that one latent stands for."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def default_size(self) -> int:
        """Side of the picture that the model was trained for, in pixels."""
        return int(self.vae["sample_size"])

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The weights' files of each component that has some; raises a ModelError for one that lacks them."""
        return {name: Checkpoint.open(self.folder / name, stem) for name, stem in STEMS.items()}

    def num_bytes_of(self, *names: str) -> int:
        """Of the weights' files of these components."""
        return sum(self.checkpoints[name].num_bytes for name in names)


def read_components(folder: Path) -> Components:
    """Raises a ModelError that names the file and the field."""
    index = Fields(read_json(folder, MODEL_INDEX), MODEL_INDEX)
    _check_pipeline(index)
    for name in CLASSES:
        _check_component(index, name)
    found = Components(
        folder,
        transformer=read_json(folder, "transformer/config.json"),
        vae=read_json(folder, "vae/config.json"),
        text_encoder=read_json(folder, "text_encoder/config.json"),
        text_encoder_2=read_json(folder, "text_encoder_2/config.json"),
        scheduler=read_json(folder, "scheduler/scheduler_config.json"),
    )
    _check_vae(Fields(found.vae, "vae/config.json"))
    _check_transformer(found)
    for name in ("text_encoder", "text_encoder_2"):
        Fields(getattr(found, name), f"{name}/config.json").refuse("quantization_config")
    return found


def _check_pipeline(index: Fields) -> None:
    name = index.values.get("_class_name")
    if isinstance(name, list):
        raise UnsupportedModel(f"{MODEL_INDEX} asks to run code from the model's repository ({name}), which is refused")
    if name != PIPELINE:
        raise UnsupportedModel(
            f"{MODEL_INDEX} says {name!r}; of image models this engine runs {PIPELINE} alone: FLUX.1 schnell, dev and"
            " their like, not the Fill, Kontext, Redux, Control and ControlNet models, nor other families"
        )


def _check_component(index: Fields, name: str) -> None:
    library, classes = CLASSES[name]
    said = index.values.get(name)
    if said is None or said == [None, None]:
        raise UnsupportedModel(f"{MODEL_INDEX}: the pipeline has no {name}; all of {', '.join(CLASSES)} are needed")
    if not isinstance(said, list) or len(said) != 2:
        raise BadModelConfig(f"{MODEL_INDEX}: {name} must be a pair of library and class, not {said!r}")
    if said[0] != library or said[1] not in classes:
        raise UnsupportedModel(f"{MODEL_INDEX}: {name} is {said[0]}.{said[1]}; this engine runs {classes[0]}")


def _check_vae(vae: Fields) -> None:
    """What FLUX's VAE is; the class of diffusers reads the rest."""
    channels = vae.list_of(int, "block_out_channels")
    if not 1 <= len(channels) <= MOST_VAE_LEVELS or not all(1 <= width <= MOST_CHANNELS for width in channels):
        raise UnsupportedModel(
            f"{vae.where}: block_out_channels must be 1 to {MOST_VAE_LEVELS} widths of up to {MOST_CHANNELS},"
            f" not {channels}"
        )
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        vae.refuse(name, [block] * len(channels))
    for name in ("in_channels", "out_channels"):
        vae.refuse(name, 3)
    for name in ("latents_mean", "latents_std", "quantization_config"):
        vae.refuse(name)
    vae.integer("latent_channels", most=MOST_CHANNELS)
    vae.integer("layers_per_block", 1, most=64)
    side = vae.integer("sample_size", most=1 << 16)
    if side % 16:
        raise UnsupportedModel(f"{vae.where}: sample_size must be a multiple of 16, not {side}")
    vae.number("shift_factor")
    if not vae.number("scaling_factor") > 0:
        raise BadModelConfig(f"{vae.where}: scaling_factor must be above 0")


def _check_transformer(found: Components) -> None:
    """What the transformer has to have in common with its neighbours."""
    fields = Fields(found.transformer, "transformer/config.json")
    fields.refuse("quantization_config")
    fields.refuse("patch_size", 1)
    fields.boolean("guidance_embeds", False)
    channels = fields.integer("in_channels", 64)
    packed = 4 * found.latent_channels
    if channels != packed or fields.integer("out_channels", channels) != packed:
        raise UnsupportedModel(
            f"{fields.where}: in_channels is {channels} and out_channels"
            f" {found.transformer.get('out_channels') or channels}, where both should be {packed}, the VAE's"
            f" {found.latent_channels} channels of 2 x 2 latents; Fill and Control models take other inputs"
        )
    text = Fields(found.text_encoder, "text_encoder/config.json").integer("hidden_size")
    long_text = Fields(found.text_encoder_2, "text_encoder_2/config.json").integer("d_model")
    for name, default, wanted, whose in (
        ("pooled_projection_dim", 768, text, "hidden_size of text_encoder/config.json"),
        ("joint_attention_dim", 4096, long_text, "d_model of text_encoder_2/config.json"),
    ):
        if (size := fields.integer(name, default)) != wanted:
            raise BadModelConfig(f"{fields.where}: {name} is {size}, but {whose} is {wanted}")
