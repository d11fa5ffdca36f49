"""Finds and reads a LoRA adapter: a safetensors file, a folder with one, or a hub repository with one.

Every tensor is accounted for: what cannot be applied is refused by name, because an adapter that is applied in part
paints something else than what its author saw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inferfleet.engine import hub
from inferfleet.engine.diffusion.lora_names import ForeignName, Place, Role, place_of
from inferfleet.engine.foreign import foreign_weights
from inferfleet.engine.model_errors import BadAdapter, ModelUnavailable, UnsupportedModel
from inferfleet.engine.progress import Progress

MAX_RANK = 512
#: An adapter of every module of FLUX has about 1500 tensors.
MAX_TENSORS = 20_000
#: Weights' names that tools give, and what PEFT writes beside its own.
WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
#: The entry of a safetensors header where diffusers puts PEFT's settings.
METADATA = "lora_adapter_metadata"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pair:
    """A and B of one module: W + factor * scale * B @ A."""

    #: [r, inputs]; modules that were one for its author share it.
    down: Tensor
    #: [outputs, r]
    up: Tensor
    factor: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter's file holds, by diffusers' module names."""

    name: str
    pairs: Mapping[str, Pair]


def read_adapter(
    name: str, source: str, modules: Mapping[str, tuple[int, int]], progress: Progress | None = None
) -> Adapter:
    """modules: path -> (outputs, inputs) of everything that an adapter may change.

    Raises BadAdapter, or a ModelError of the hub's.
    source: a .safetensors file, a folder, `owner/name` or `owner/name/file.safetensors` on the hub.
    """
    try:
        path = find_weights(source, progress)
        places, tensors, header = _read(path, modules)
        settings = _settings(path, header)
        pairs: dict[str, Pair] = {}
        for key, group in _groups(places).items():
            found = _pairs_of(key, group, places, tensors, modules, settings)
            if twice := sorted(pairs.keys() & found.keys()):
                raise _Refused(f"two of its pairs are for {twice[0]}")
            pairs |= found
    except (ModelUnavailable, UnsupportedModel) as error:
        raise type(error)(f"the LoRA adapter {name}: {error.message}", param="loras") from error
    except _Refused as error:
        raise BadAdapter(f"the LoRA adapter {name} ({source}): {error}", param="loras") from error
    return Adapter(name, pairs)


class _Refused(ValueError):
    """Why an adapter cannot be applied, without its name."""


def find_weights(source: str, progress: Progress | None = None) -> Path:
    """The safetensors file of an adapter."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _Refused(foreign_weights([path.name]) or "an adapter is a .safetensors file")
        return path
    if not hub.is_adapter(source):
        raise _Refused("there is no such file or folder, and no hub id reads owner/name or owner/name/file.safetensors")
    path = hub.download_adapter(source, progress)
    return path if path.is_file() else _in_folder(path)


def _in_folder(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise _Refused(f"the folder holds {len(found)} safetensors files; name the one that is meant")
    others = foreign_weights(path.name for path in folder.glob("*"))
    raise _Refused("the folder holds no safetensors file" + (f" ({others})" if others else ""))


def _read(
    path: Path, modules: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Place], dict[str, Tensor], dict[str, str]]:
    """Place of each tensor, the tensors, and the header's own words."""
    flat = {module.replace(".", "_"): module for module in modules}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if not 0 < len(names) <= MAX_TENSORS:
                raise _Refused(f"it holds {len(names)} tensors, and 1 to {MAX_TENSORS} are taken")
            places: dict[str, Place] = {}
            for name in names:
                try:
                    places[name] = place_of(name, modules, flat)
                except ForeignName as error:
                    raise _Refused(f"tensor {name} {error}; only LoRA of the transformer is applied") from None
                _check_rank(name, places[name].role, file.get_slice(name).get_shape())
            tensors = {name: _numbers(name, file.get_tensor(name)) for name in names}
            return places, tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _Refused(f"{path.name} is not a readable safetensors file: {error}") from error


def _check_rank(name: str, role: Role, shape: list[int]) -> None:
    if role == "alpha":
        if math.prod(shape) != 1:
            raise _Refused(f"tensor {name} is {shape} and should be one number")
        return
    if len(shape) != 2:
        raise _Refused(f"tensor {name} is {shape} and should be a matrix")
    rank = shape[0] if role == "down" else shape[1]
    if not 1 <= rank <= MAX_RANK:
        raise _Refused(f"tensor {name} has rank {rank}, and 1 to {MAX_RANK} are taken")


def _numbers(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise _Refused(f"tensor {name} is stored as {tensor.dtype}; float32, bfloat16 and float16 are read")
    if not tensor.isfinite().all():
        raise _Refused(f"tensor {name} holds numbers that are not finite")
    return tensor


def _groups(places: Mapping[str, Place]) -> dict[tuple[str, ...], dict[Role, str]]:
    """Modules that are one matrix in the file -> the tensors for them."""
    groups: dict[tuple[str, ...], dict[Role, str]] = {}
    for name, place in places.items():
        group = groups.setdefault(place.modules, {})
        if group.setdefault(place.role, name) != name:
            raise _Refused(f"tensors {group[place.role]} and {name} are both for {', '.join(place.modules)}")
    return groups


def _pairs_of(
    key: tuple[str, ...],
    names: Mapping[Role, str],
    places: Mapping[str, Place],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, tuple[int, int]],
    settings: _Settings,
) -> dict[str, Pair]:
    """The pair of each module of a group."""
    some = next(iter(names.values()))
    if "down" not in names or "up" not in names:
        raise _Refused(f"tensor {some} has no partner: {', '.join(key)} needs an A and a B")
    down, up = tensors[names["down"]], tensors[names["up"]]
    sizes = [modules[module][0] for module in key]
    rank, inputs = down.shape[0], modules[key[0]][1]
    for name, found, wanted in ((names["down"], down, [rank, inputs]), (names["up"], up, [sum(sizes), rank])):
        if list(found.shape) != wanted:
            raise _Refused(f"tensor {name} is {list(found.shape)} and should be {wanted}")
    if places[names["up"]].is_swapped:
        up = torch.cat(up.chunk(2)[::-1])
    alpha = float(tensors[names["alpha"]]) if "alpha" in names else None
    ups = up.split(sizes)
    return {
        module: Pair(down, part, settings.factor(module, rank, alpha, names["down"]))
        for module, part in zip(key, ups, strict=True)
    }


@dataclass(frozen=True)
class _Settings:
    """What PEFT's settings say of alpha and rank; without any a pair's alpha is its rank, as everywhere."""

    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    #: alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023).
    is_rank_stabilised: bool = False

    def factor(self, module: str, rank: int, alpha: float | None, name: str) -> float:
        """alpha: what a tensor of the file says."""
        said = _matching(self.ranks or {}, module, self.rank)
        if said is not None and said != rank:
            raise _Refused(f"tensor {name} has rank {rank}, but the adapter's settings say {said}")
        alpha = _matching(self.alphas or {}, module, self.alpha) if alpha is None else alpha
        alpha = float(rank) if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that the module's path is, or ends with as whole names."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return otherwise


def _settings(path: Path, header: Mapping[str, str]) -> _Settings:
    """From adapter_config.json beside PEFT's own file, or from what diffusers puts into the file's header."""
    config = path.parent / CONFIG
    if path.name == WEIGHTS[0] and config.is_file():
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise _Refused(f"{CONFIG} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        return _parsed(_json(config.read_bytes(), CONFIG), CONFIG)
    if METADATA in header:
        values = _json(header[METADATA], METADATA)
        own = {key.removeprefix("transformer."): value for key, value in values.items() if "text_enc" not in key}
        return _parsed(own, f"the header's {METADATA}")
    return _Settings()


def _json(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise _Refused(f"{where} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise _Refused(f"{where} is no JSON object")
    return values


#: Settings of PEFT that change what is computed -> the values with which it is plain LoRA.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    # The others move a part of the base weight into the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def _parsed(values: Mapping[str, Any], where: str) -> _Settings:
    for field, allowed in _PLAIN.items():
        if values.get(field) is not None and values[field] not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise _Refused(f"{where}: {field} is {values[field]!r}; it is applied only where that is {shown}")
    rank_stabilised = values.get("use_rslora", False)
    if not isinstance(rank_stabilised, bool):
        raise _Refused(f"{where}: use_rslora must be true or false, not {rank_stabilised!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    return _Settings(
        None if rank is None else int(_number(rank, "r", where)),
        None if alpha is None else _number(alpha, "lora_alpha", where),
        {name: int(value) for name, value in _pattern(values, "rank_pattern", where).items()},
        _pattern(values, "alpha_pattern", where),
        rank_stabilised,
    )


def _pattern(values: Mapping[str, Any], field: str, where: str) -> dict[str, float]:
    patterns = values.get(field) or {}
    if not isinstance(patterns, dict):
        raise _Refused(f"{where}: {field} must be an object, not {patterns!r}")
    for pattern in patterns:
        # PEFT takes regular expressions; a file from elsewhere gets none of ours to run.
        if not pattern.removeprefix("^").replace(".", "").replace("_", "").isalnum():
            raise _Refused(f"{where}: {field} has the pattern {pattern!r}; names of modules are taken")
    return {pattern: _number(value, field, where) for pattern, value in patterns.items()}


def _number(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise _Refused(f"{where}: {field} must be a number above 0, not {value!r}")
    return float(value)
