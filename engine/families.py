"""Which class runs which architecture: one dull line each, imported on use; and how a folder becomes a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from inferfleet.engine.batch import Batch
from inferfleet.engine.border import Border
from inferfleet.engine.cache_spec import CacheSpec
from inferfleet.engine.config import ModelConfig, read_config
from inferfleet.engine.diffusion.components import is_pipeline
from inferfleet.engine.errors import LoadError
from inferfleet.engine.group import ALONE, Group
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.matformer import SliceTable
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.place import Place
from inferfleet.engine.progress import Progress
from inferfleet.engine.quantized.scheme import read_scheme
from inferfleet.engine.quantized.stream import weights_of
from inferfleet.engine.weights import Checkpoint, commit_of, find_folder
from inferfleet.kernels.quantized import Kind

#: config.json's architecture -> (family, module, class)
FAMILIES = {
    "DeepseekV2ForCausalLM": ("deepseek_v2", "inferfleet.engine.models.deepseek_v2", "DeepseekV2ForCausalLM"),
    "DeepseekV3ForCausalLM": ("deepseek_v3", "inferfleet.engine.models.deepseek_v3", "DeepseekV3ForCausalLM"),
    "Gemma3nForCausalLM": ("gemma3n", "inferfleet.engine.models.gemma3n", "Gemma3nForCausalLM"),
    "Gemma3nForConditionalGeneration": (
        "gemma3n",
        "inferfleet.engine.models.gemma3n",
        "Gemma3nForConditionalGeneration",
    ),
    "Gemma4ForCausalLM": ("gemma4", "inferfleet.engine.models.gemma4", "Gemma4ForCausalLM"),
    "Gemma4ForConditionalGeneration": ("gemma4", "inferfleet.engine.models.gemma4", "Gemma4ForConditionalGeneration"),
    "Llama4ForCausalLM": ("llama4", "inferfleet.engine.models.llama4", "Llama4ForCausalLM"),
    "Llama4ForConditionalGeneration": ("llama4", "inferfleet.engine.models.llama4", "Llama4ForConditionalGeneration"),
    "PhiMoEForCausalLM": ("phimoe", "inferfleet.engine.models.phimoe", "PhiMoEForCausalLM"),
    "PhimoeForCausalLM": ("phimoe", "inferfleet.engine.models.phimoe", "PhimoeForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "inferfleet.engine.models.qwen3", "Qwen3ForCausalLM"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "inferfleet.engine.models.qwen3_moe", "Qwen3MoeForCausalLM"),
    "Qwen3NextForCausalLM": ("qwen3_next", "inferfleet.engine.models.qwen3_next", "Qwen3NextForCausalLM"),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        "inferfleet.engine.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration",
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "qwen3_vl",
        "inferfleet.engine.models.qwen3_vl",
        "Qwen3VLMoeForConditionalGeneration",
    ),
}

#: Families whose class takes `slices`: MatFormers, trained to be cut.
SLICED = ("gemma3n",)


class Computes(Protocol):
    """What a step needs of a model."""

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions of a step -> hidden states [T, H], of which those at batch.logits_index count."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] that `forward` gave -> float32 logits [N, V]."""


class Model(Computes, Protocol):
    """What a family's class is to the engine."""

    #: Whether several ranks can hold it together.
    can_split: bool
    #: Whether steps that only decode can be recorded.
    can_replay: bool

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        """Reads its fields from a whole config.json; memory for the weights comes as they are read."""

    @property
    def cache_spec(self) -> CacheSpec:
        """What its layers keep between steps."""

    @property
    def border(self) -> Border | None:
        """Beyond which length another variant of the model computes a whole sequence; None for most models."""

    def load(self, weights: Iterable[tuple[str, Weight]]) -> None:
        """Fills the weights and packs each layer that is complete; raises WeightsMismatch with every difference."""

    def finalize(self) -> None:
        """Lays out what `load` could not; once, after it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what is known about it."""

    model: Model
    config: ModelConfig
    family: str
    folder: Path
    #: The hub commit the folder holds, or None.
    commit: str | None
    dtype: torch.dtype
    device: torch.device
    #: Seconds of each phase: find, build, read, pack.
    load_seconds: Mapping[str, float]
    #: Who holds the rest of it.
    group: Group = ALONE
    #: What requests may ask for beside the whole model, if anything.
    slices: SliceTable | None = None
    #: How weights are coded: as was asked, or as the checkpoint has them, for example "gptq-int4"; None = they are not.
    quantization: str | None = None


def find_family(architecture: str) -> tuple[str, type[Any]]:
    """(family name, class) for an architecture; UnsupportedModel lists the known ones."""
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"no family runs the architecture {architecture!r}; known are {known}")
    family, module, name = FAMILIES[architecture]
    return family, getattr(import_module(module), name)


def refuse_unsplit(architecture: str, model_class: type[Any], ranks: int) -> None:
    """Raises UnsupportedModel where several ranks are to hold a model that cannot be shared out."""
    if ranks > 1 and not model_class.can_split:
        raise UnsupportedModel(
            f"{architecture} cannot be split over several ranks yet: leave tensor_parallel_size at 1"
        )


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: Kind | None = None,
    progress: Progress | None = None,
    group: Group = ALONE,
    slices: SliceTable | None = None,
) -> LoadedModel:
    """Loads a local folder or a hub id; raises a ModelError.

    dtype: "auto" (the checkpoint's), "float32" or "bfloat16".
    device: "auto" (CUDA where there is one), "cpu", "cuda:0".
    group: the ranks that hold the model together; each loads its share.
    slices: of a MatFormer; LoadError for any other model.
    quantization: what linear layers and experts become while they are read; routers, norms, embeddings and the head
    stay as they are.
    """
    clock, progress = _Clock(), progress or Progress()
    progress.begin("find")
    folder = find_folder(path, revision, progress)
    if is_pipeline(folder):
        raise UnsupportedModel(f"{path} is an image model, a pipeline of components; here a language model is wanted")
    config = read_config(folder)
    family, model_class = find_family(config.architecture)
    scheme = read_scheme(config.raw)
    coded = quantization if scheme is None else scheme.name
    refuse_pairs(family, coded, quantization, slices)
    refuse_unsplit(config.architecture, model_class, group.size)
    place = Place(config.dtype(dtype), find_device(device, group), group, quantization)
    checkpoint = Checkpoint.open(folder)
    clock.lap("find")
    cut = {} if slices is None else {"slices": slices}
    model: Model = model_class(config.raw, place=place, **cut)
    clock.lap("build")
    progress.begin("read", checkpoint.num_bytes)
    model.load(progress.counted(checkpoint.tensors() if scheme is None else weights_of(checkpoint, scheme)))
    clock.lap("read")
    model.finalize()
    clock.lap("pack")
    return LoadedModel(
        model,
        config,
        family,
        folder,
        commit_of(folder),
        place.dtype,
        place.device,
        clock.laps,
        group=group,
        slices=slices,
        quantization=coded,
    )


def refuse_pairs(family: str, coded: str | None, quantization: Kind | None, slices: SliceTable | None) -> None:
    """Raises for settings that do not go together, or not with this model."""
    if slices is not None and family not in SLICED:
        raise LoadError(
            f"matformer_config_path is set, but {family} is no MatFormer: only {', '.join(SLICED)} has slices",
            param="matformer_config_path",
        )
    if quantization is not None and coded != quantization:
        raise UnsupportedModel(f"quantization {quantization} was asked for, but the checkpoint is {coded} already")
    if coded is not None and slices is not None:
        raise LoadError(
            f"quantization is {coded} and matformer_config_path is set: slices are cut from plain weights only",
            param="quantization",
        )


def find_device(name: str, group: Group = ALONE) -> torch.device:
    """The device of that name; CUDA for "auto" where there is some. UnsupportedModel for what this machine has not.

    Rank r of a split model has the r-th GPU from the named one, or from the first, on.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedModel(f"device {name!r} is not a device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel(f"device {name!r} was asked for, but this machine has no usable CUDA device")
    if device.type != "cuda" or group.size == 1:
        return device
    first = device.index or 0
    if first + group.size > torch.cuda.device_count():
        raise UnsupportedModel(
            f"{group.size} ranks from device {name!r} on need more GPUs than the {torch.cuda.device_count()} there are"
        )
    torch.cuda.set_device(first + group.rank)
    return torch.device("cuda", first + group.rank)


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
