"""Finds a model's folder (local or on the Hugging Face hub) and streams its safetensors, one tensor at a time.

It knows files, not models: which tensor belongs where is the family's business. Nothing but safetensors is read,
because the other formats can run code when they are opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inferfleet.engine import hub
from inferfleet.engine.foreign import foreign_weights
from inferfleet.engine.model_errors import ModelUnavailable, UnsupportedModel
from inferfleet.engine.progress import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: The header's names of the formats that are read, and of those that a refusal should name.
_FORMATS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def find_folder(path: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The local folder of a model: `path` itself, or the downloaded snapshot of the hub id `path` at `revision`.

    A revision is a branch, tag or commit; only a commit stays the same for ever. Raises ModelUnavailable.
    """
    return local_folder(path) or hub.download(path, revision, progress)


def local_folder(path: str) -> Path | None:
    """The folder, or None for what can only be a hub id; ModelUnavailable for what is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelUnavailable(f"{path} is a file; a model is a folder with config.json and safetensors in it")
    if not _HUB_ID.fullmatch(path):
        raise ModelUnavailable(f"there is no folder {path}, and it is not a hub id of the form owner/name")
    return None


def commit_of(folder: Path) -> str | None:
    """The hub commit that a snapshot folder holds, or None for a folder that did not come from the hub."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model folder, in reading order."""

    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, stem: str = "model") -> Checkpoint:
        """Finds <stem>.safetensors, or the shards that <stem>.safetensors.index.json names; raises a ModelError."""
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return cls((single,))
        if index.is_file():
            return cls(_shards(folder, index))
        others = foreign_weights(p.name for p in folder.glob("*"))
        hint = f" ({others})" if others else ""
        raise UnsupportedModel(f"{folder} holds neither {single.name} nor {index.name}{hint}")

    @property
    def num_bytes(self) -> int:
        """Of all files, headers included."""
        return sum(path.stat().st_size for path in self.files)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every tensor, each read when it is asked for and not kept."""
        for path in self.files:
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in file.keys():  # noqa: SIM118 (the handle is no mapping and cannot be iterated)
                        yield name, plain(name, file.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise ModelUnavailable(f"{path} is not a readable safetensors file: {error}") from error

    @contextmanager
    def by_name(self) -> Iterator[TensorsByName]:
        """All tensors, each read when it is asked for, whatever its file; the files stay open meanwhile."""
        with ExitStack() as opened:
            places: dict[str, Any] = {}
            for path in self.files:
                try:
                    file = opened.enter_context(safe_open(path, framework="pt", device="cpu"))
                    places |= dict.fromkeys(sorted(file.keys()), file)
                except (SafetensorError, OSError) as error:
                    raise ModelUnavailable(f"{path} is not a readable safetensors file: {error}") from error
            yield TensorsByName(places)


class TensorsByName:
    """Names of tensors in the order of their files, and what they name."""

    def __init__(self, places: Mapping[str, Any]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def outline(self, name: str) -> Tensor:
        """Shape and number format of a tensor, from the file's header: it lies on the meta device."""
        header = self._places[name].get_slice(name)
        return torch.empty(header.get_shape(), dtype=_FORMATS.get(header.get_dtype(), torch.uint8), device="meta")

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._places[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelUnavailable(f"tensor {name} cannot be read: {error}") from error
        return tensor


def plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it is made of ordinary numbers."""
    if tensor.dtype not in _FLOATS:
        raise UnsupportedModel(
            f"tensor {name} is stored as {tensor.dtype}, which no quantization_config in config.json explains"
        )
    return tensor


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{index} is not a readable index with a weight_map: {error}") from error
    # An index comes from the model's author: it may name files beside itself and no others.
    foreign = [n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")]
    if foreign or not names:
        raise UnsupportedModel(f"{index} must name safetensors files of its own folder, not {foreign}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ModelUnavailable(f"{folder} lacks {len(absent)} of {len(names)} shards: {', '.join(absent)}")
    return tuple(folder / name for name in names)
