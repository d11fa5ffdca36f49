"""Writes a model's folder again with its weights coded, in the published layout of compressed-tensors.

One tensor is read, coded and put in a file at a time; a file is written when it is full. Everything goes to a folder
beside the one that was asked for, which takes its name when it is whole: there is never half a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inferfleet.engine.config import ModelConfig
from inferfleet.engine.costs import in_units
from inferfleet.engine.errors import EngineError
from inferfleet.engine.families import find_family
from inferfleet.engine.layers.slots import Slot, Slots
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.place import Place
from inferfleet.engine.quantized.packing import quantization_config, tensors_of
from inferfleet.engine.weights import Checkpoint
from inferfleet.kernels.quantized import Kind, quantise

#: A file is written when it has come to so much.
SHARD_BYTES = 1 << 30
#: What belongs to a model beside its configuration and weights: tokenizer, templates, licence.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "additional_chat_templates")
NOT_COPIED = frozenset({"config.json", "model.safetensors.index.json", "quality_report.json"})
#: Beyond the weights: tokenizer, headers and what a file system keeps for itself.
ROOM = 64 << 20


class ArtefactError(EngineError):
    """The quantised model cannot be written."""

    code = "artefact_failed"


def check_target(out: Path) -> None:
    """ArtefactError unless a model can be written to `out`: a new or empty folder in one that is there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtefactError(f"{out} is there and is no folder; a quantised model is written as a new one")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ArtefactError(f"{out.parent} is not a folder that can be written to")
    if out.exists() and any(out.iterdir()):
        raise ArtefactError(f"{out} is not empty; a quantised model is written to a new or empty folder")


def write_artefact(
    folder: Path, config: ModelConfig, kind: Kind, out: Path, finish: Callable[[Path], None] = lambda _: None
) -> int:
    """Writes the model of `folder` to `out`; gives the bytes of its weights.

    finish: called with the folder before it takes its name. Raises ArtefactError, a ModelError; nothing is left then.
    """
    check_target(out)
    checkpoint = Checkpoint.open(folder)
    if shutil.disk_usage(out.parent).free < (needed := _artefact_bytes(checkpoint, config, kind) + ROOM):
        raise ArtefactError(f"the quantised model needs about {in_units(needed)}, more than is free in {out.parent}")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        files = _Files(partial)
        coding = _write_weights(checkpoint, slots_of(config, kind), kind, files)
        files.close()
        _copy_companions(folder, partial)
        raw = dict(config.raw) | {"quantization_config": coding}
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        finish(partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"the quantised model could not be written to {out}, nothing is left: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files.num_bytes


def slots_of(config: ModelConfig, kind: Kind) -> Slots:
    """Where a model's tensors would go; it takes no memory."""
    _, model_class = find_family(config.architecture)
    place = Place(torch.float32, torch.device("meta"), quantization=kind)
    slots: Slots = model_class(config.raw, place=place).checkpoint_slots()
    return slots


def weight_bytes(slots: Slots, dtype: torch.dtype, kind: Kind | None) -> int:
    """Memory of a model's weights as they are served, plain or coded."""
    return sum(_slot_bytes(slot, dtype, kind) for slot in slots.tensors.values())


def _slot_bytes(slot: Slot, dtype: torch.dtype, kind: Kind | None) -> int:
    plain = torch.empty(slot.shape, device="meta")
    if kind is None or slot.quantization != kind:
        return plain.numel() * dtype.itemsize
    matrices = plain.view(-1, *slot.shape[-2:])
    return len(matrices) * quantise(matrices[0], kind).nbytes


def _artefact_bytes(checkpoint: Checkpoint, config: ModelConfig, kind: Kind) -> int:
    """About: what goes along unused, such as an image encoder, is what the files have beyond the model."""
    slots = slots_of(config, kind)
    unused = checkpoint.num_bytes - weight_bytes(slots, config.dtype(), None)
    return max(unused, 0) + weight_bytes(slots, config.dtype(), kind)


def _write_weights(checkpoint: Checkpoint, slots: Slots, kind: Kind, files: _Files) -> dict[str, Any]:
    """All tensors, coded where the model would code them. What it has no use for goes along as it is."""
    groups: dict[str, int] = {}
    plain: list[str] = []
    turned = _turned_stacks(checkpoint, slots)
    for name, tensor in checkpoint.tensors():
        for part_name, part, is_coded in _parts(slots, name, tensor.transpose(1, 2) if name in turned else tensor):
            module = part_name.removesuffix(".weight")
            if not is_coded:
                files.add(part_name, part)
                if part.dim() == 2 and module != part_name and "embed" not in module:
                    plain.append(module)
                continue
            coded = quantise(part, kind)
            groups[module] = coded.group
            for last, coded_part in tensors_of(coded).items():
                files.add(f"{module}.{last}", coded_part)
    return quantization_config(kind, groups, plain)


def _parts(slots: Slots, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is to be coded): a tensor itself, or the experts that it holds one by one."""
    slot = slots.tensors.get(name)
    if slot is not None and slot.quantization is not None:
        if not slot.takes_codes or tensor.dim() != 2 or not name.endswith(".weight"):
            raise UnsupportedModel(f"tensor {name} has no name in compressed-tensors: this family is not written")
        yield name, tensor, True
    elif name in slots.stacks and slots.stacks[name][0].quantization is not None:
        yield from _experts(slots, name, tensor)
    else:
        yield name, tensor, False


def _turned_stacks(checkpoint: Checkpoint, slots: Slots) -> frozenset[str]:
    """All stacks of experts if they come as [E, inputs, outputs]; their shapes tell, except where they are square."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.files:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in slots.stacks.keys() & set(file.keys())}
    is_turned = any(shape != slots.stacks[name][0].shape for name, shape in shapes.items())
    return frozenset(shapes) if is_turned else frozenset()


def _experts(slots: Slots, name: str, stack: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """Each expert's share of a stack, under the names that one-by-one checkpoints have for it."""
    names = slots.stacks[name][1]
    each = len(names) // len(stack)
    for number, expert in enumerate(stack):
        own = names[number * each : (number + 1) * each]
        for part_name, part in zip(own, expert.split([slots.tensors[n].shape[0] for n in own]), strict=True):
            yield part_name, part, True


@dataclass
class _Files:
    """The safetensors of a folder, filled one after another."""

    folder: Path
    num_bytes: int = 0
    _held: dict[str, Tensor] = field(default_factory=dict)
    _held_bytes: int = 0
    #: Names of tensors, file by file.
    _written: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> None:
        # A view would keep, and write, the whole that it is a part of.
        self._held[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._held_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes
        if self._held_bytes >= SHARD_BYTES:
            self._write()

    def close(self) -> None:
        """Writes the rest, gives the files their last names, and the index if there are several."""
        if self._held or not self._written:
            self._write()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            last = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self.folder / last)
            weight_map |= dict.fromkeys(names, last)
        if count > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        path = self._file(len(self._written))
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(self.folder.stat().st_mode & 0o666)  # else it is its writer's alone
        self._written.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"


def _copy_companions(folder: Path, out: Path) -> None:
    for pattern in COMPANIONS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name)
            elif path.name not in NOT_COPIED:
                shutil.copyfile(path, out / path.name)
