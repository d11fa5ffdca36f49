"""Gives a torch module that was built without memory its weights: each parameter is a slot of its checkpoint's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from inferfleet.engine.layers.slots import Slot, Slots, fill
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import Checkpoint, TensorsByName, plain

#: A checkpoint's name of a tensor -> the module's own name for it; None = the module has no use for it.
Rename = Callable[[str], str | None]


def unchanged(name: str) -> str | None:
    """The module carries the checkpoint's names and needs every tensor."""
    return name


def load_module(
    module: nn.Module, checkpoint: Checkpoint, device: torch.device, progress: Progress, rename: Rename = unchanged
) -> None:
    """Fills a module that lies on the meta device; WeightsMismatch names every difference."""
    with checkpoint.by_name() as tensors:
        fill(parameter_slots(module, device), progress.counted(wanted(tensors, rename)))


def check_module(module: nn.Module, checkpoint: Checkpoint, rename: Rename = unchanged) -> None:
    """As `load_module`, but compares headers only and leaves the module empty."""
    nowhere = Slots({name: Slot.unused(*slot.shape) for name, slot in parameter_slots(module).tensors.items()})
    with checkpoint.by_name() as tensors:
        names = own_names(tensors, rename)
        fill(nowhere, ((own, plain(name, tensors.outline(name))) for own, name in names.items()))


def parameter_slots(module: nn.Module, device: torch.device | None = None) -> Slots:
    """A slot for every parameter and stored buffer of a module, under the module's own names.

    What is put is copied to the device in the number format that the parameter was built with.
    """
    stored, found = module.state_dict(), Slots()
    for path, owner in module.named_modules():
        for name in (*owner._parameters, *owner._buffers):
            whole = f"{path}.{name}" if path else name
            if whole in stored:
                found.tensors[whole] = _slot(owner, name, stored[whole], device)
    return found


def _slot(owner: nn.Module, name: str, built: Tensor, device: torch.device | None) -> Slot:
    def put(tensor: Tensor) -> None:
        # A copy always: the file's own memory is mapped, and would change with the file.
        hold(owner, name, tensor.to(device, built.dtype, copy=True))

    return Slot(put, tuple(built.shape), num_bytes=built.nbytes)


def hold(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes a tensor the module's parameter (or buffer) of that name; nothing here is ever trained."""
    if name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def let_go(module: nn.Module) -> None:
    """Frees the memory of a module and its parts: they lie on the meta device again."""
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            hold(owner, name, torch.empty_like(tensor, device="meta"))


def own_names(tensors: TensorsByName, rename: Rename) -> dict[str, str]:
    """The module's own name -> the file's, in the file's order. Of two names of one tensor the first counts."""
    names: dict[str, str] = {}
    for name in tensors:
        if (own := rename(name)) is not None:
            names.setdefault(own, name)
    return names


def wanted(tensors: TensorsByName, rename: Rename) -> Iterator[tuple[str, Tensor]]:
    """(the module's own name, tensor) of every tensor that the module has use for, each read when it is asked for."""
    for own, name in own_names(tensors, rename).items():
        yield own, plain(name, tensors.read(name))
