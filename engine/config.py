"""Reads config.json and generation_config.json of a model folder: what every family needs to know, and nothing else.

The families read their own fields from `ModelConfig.raw` through `Fields`, which names a missing or wrong field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inferfleet.engine.model_errors import BadModelConfig, ModelUnavailable, UnsupportedModel

#: Names that config.json and the settings use for the dtypes that this engine computes in. A float16 checkpoint is run
#: in bfloat16: Gemma's activations leave float16's range, and CPUs have no fast float16.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}

_NO_DEFAULT: Any = object()


class Fields:
    """A JSON object whose fields are read by name and type; errors carry the file's name and the dotted field."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int = _NO_DEFAULT, *, least: int = 1, most: int | None = None) -> int:
        value = self._read(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BadModelConfig(f"{self.where}: {name} must be an integer of at least {least}, not {value!r}")
        if most is not None and value > most:
            raise BadModelConfig(f"{self.where}: {name} must be at most {most}, not {value}")
        return value

    def number(self, name: str, default: float = _NO_DEFAULT) -> float:
        value = self._read(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise BadModelConfig(f"{self.where}: {name} must be a finite number, not {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool = _NO_DEFAULT) -> bool:
        value = self._read(name, default)
        if not isinstance(value, bool):
            raise BadModelConfig(f"{self.where}: {name} must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str = _NO_DEFAULT) -> str:
        value = self._read(name, default)
        if not isinstance(value, str):
            raise BadModelConfig(f"{self.where}: {name} must be a string, not {value!r}")
        return value

    def list_of(self, kind: type, name: str, default: list[Any] = _NO_DEFAULT) -> list[Any]:
        value = self._read(name, default)
        if not isinstance(value, list) or any(not isinstance(item, kind) for item in value):
            raise BadModelConfig(f"{self.where}: {name} must be a list of {kind.__name__}, not {value!r}")
        return value

    def section(self, name: str, default: Mapping[str, Any] = _NO_DEFAULT) -> Fields:
        value = self._read(name, default)
        if not isinstance(value, Mapping):
            raise BadModelConfig(f"{self.where}: {name} must be an object, not {value!r}")
        return Fields(value, f"{self.where}: {name}")

    def refuse(self, name: str, *allowed: Any) -> None:
        """Raises UnsupportedModel unless the field is absent, null or one of the allowed values."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            shown = " or ".join(repr(a) for a in allowed) or "absent"
            raise UnsupportedModel(f"{self.where}: {name} is {value!r}; this engine runs it only when it is {shown}")

    def _read(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _NO_DEFAULT:
            raise BadModelConfig(f"{self.where}: the field {name} is missing")
        return default


@dataclass(frozen=True)
class ModelConfig:
    """What the engine asks of any model, whatever its family."""

    architecture: str
    #: The whole of config.json, as the family's class takes it.
    raw: Mapping[str, Any]
    vocab_size: int
    #: Longest context that the position encoding was made for, YaRN's stretching included.
    max_positions: int
    #: Ends of a generation from config.json and generation_config.json together, sorted.
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    #: The checkpoint's own dtype as config.json names it, or None where it does not.
    dtype_name: str | None
    #: Sampling defaults of generation_config.json (temperature, top_p, ...), unchecked.
    generation: Mapping[str, Any]

    def dtype(self, wanted: str = "auto") -> torch.dtype:
        """The dtype to compute in: `wanted`, or the checkpoint's own for "auto" (bfloat16 where it says none)."""
        name = (self.dtype_name or "bfloat16") if wanted == "auto" else wanted
        if name not in DTYPES:
            raise UnsupportedModel(f"dtype {name!r} is not one of {', '.join(sorted(DTYPES))}")
        return DTYPES[name]


def read_config(folder: Path) -> ModelConfig:
    """Reads a model folder's configuration files; raises a ModelError that names the file and the field."""
    raw = read_json(folder, "config.json")
    generation = read_json(folder, "generation_config.json", optional=True)
    fields = Fields(raw)
    refuse_foreign(fields)
    text = text_section(raw)
    return ModelConfig(
        architecture=_architecture(fields),
        raw=raw,
        vocab_size=text.integer("vocab_size"),
        max_positions=_max_positions(text),
        eos_token_ids=tuple(sorted(_ids(raw) | _ids(text.values) | _ids(generation))),
        bos_token_id=_first(generation, raw, text.values, name="bos_token_id"),
        pad_token_id=_first(generation, raw, text.values, name="pad_token_id"),
        dtype_name=_dtype_name(raw, text.values),
        generation=generation,
    )


def text_section(raw: Mapping[str, Any]) -> Fields:
    """The language model's own part of a config.json: `text_config` of a multimodal model, else the whole."""
    nested = raw.get("text_config")
    if not isinstance(nested, Mapping):
        return Fields(raw)
    # The head belongs to the whole model, so the outer word on tying it counts.
    tied = raw.get("tie_word_embeddings")
    outer = {} if tied is None else {"tie_word_embeddings": tied}
    return Fields({**nested, **outer}, "config.json: text_config")


def refuse_foreign(fields: Fields) -> None:
    """Refuses what would need the repository's own code or another number format."""
    own_class = fields.section("auto_map", {}).values.get("AutoModelForCausalLM")
    # Older uploads carry the code of an architecture that has since become common property: it is never run, and what
    # the family computes is what it says. Code for anything else has no counterpart here.
    if "auto_map" in fields and str(own_class).rpartition(".")[2] not in fields.list_of(str, "architectures", []):
        raise UnsupportedModel("config.json: auto_map asks to run code from the model's repository, which is refused")


def _architecture(fields: Fields) -> str:
    names = fields.list_of(str, "architectures")
    if len(names) != 1:
        raise BadModelConfig(f"config.json: architectures must hold one name, not {names!r}")
    return names[0]


def _max_positions(text: Fields) -> int:
    longest = text.integer("max_position_embeddings")
    scaling = text.values.get("rope_scaling") or text.values.get("rope_parameters")
    if isinstance(scaling, Mapping) and (scaling.get("rope_type") or scaling.get("type")) == "yarn":
        rope = Fields(scaling, f"{text.where}: rope_scaling")
        original = rope.integer("original_max_position_embeddings", longest)
        # Qwen3's config.json keeps the unstretched figure: only the factor says how far YaRN reaches.
        longest = max(longest, int(original * rope.number("factor", longest / original)))
    return longest


def _ids(values: Mapping[str, Any]) -> set[int]:
    eos = values.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise BadModelConfig(f"eos_token_id must be a token id or a list of them, not {eos!r}")
    return set(ids)


def _first(*sources: Mapping[str, Any], name: str) -> int | None:
    for source in sources:
        if isinstance(value := source.get(name), int):
            return value
    return None


def _dtype_name(*sources: Mapping[str, Any]) -> str | None:
    for source in sources:
        for key in ("dtype", "torch_dtype"):
            if isinstance(value := source.get(key), str):
                return value
    return None


def read_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """The object in a configuration file. Raises ModelUnavailable or BadModelConfig, naming it."""
    path = folder / name
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelUnavailable(f"there is no {name} in {folder}") from None
    except (OSError, ValueError) as error:
        raise BadModelConfig(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadModelConfig(f"{path} must hold a JSON object")
    return value
