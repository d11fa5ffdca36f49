"""Puts a text encoder's weights where they stay, and, offloaded, keeps them off the device between prompts.

Offloaded, each part of the encoder gets its weights when it computes and gives them up right after, so that even a
large encoder never takes more of the device than its largest part. For a GPU the weights wait in the host's memory. A
CPU has no other memory: there they stay in the files and are read anew for every prompt that is not cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inferfleet.engine.diffusion.filling import Rename, check_module, let_go, load_module, own_names, parameter_slots
from inferfleet.engine.layers.slots import Slot
from inferfleet.engine.model_errors import ModelUnavailable
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import Checkpoint, plain

#: Gives a tensor by the module's own name for it.
Read = Callable[[str], Tensor]
#: Opens what holds the weights between prompts.
Source = Callable[[], AbstractContextManager[Read]]


class Encoder(Protocol):
    """What the text encoders have in common."""

    rename: Rename

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, part) of the parts that compute one after another; together they hold every weight."""


def load_encoder(
    encoder: Any, checkpoint: Checkpoint, device: torch.device, progress: Progress, *, offloaded: bool
) -> None:
    """Fills an encoder (a module that is an Encoder, on the meta device) to stay, or to come and go. A ModelError."""
    if not offloaded:
        load_module(encoder, checkpoint, device, progress, encoder.rename)
        return
    slots = parameter_slots(encoder, device).tensors
    if device.type == "cpu":
        check_module(encoder, checkpoint, encoder.rename)
        _come_and_go(encoder, slots, lambda: _in_files(checkpoint, encoder.rename))
        return
    load_module(encoder, checkpoint, torch.device("cpu"), progress, encoder.rename)
    held = dict(encoder.state_dict())
    let_go(encoder)
    _come_and_go(encoder, slots, lambda: nullcontext(held.__getitem__))


@contextmanager
def _in_files(checkpoint: Checkpoint, rename: Rename) -> Iterator[Read]:
    with checkpoint.by_name() as tensors:
        names = own_names(tensors, rename)

        def read(own: str) -> Tensor:
            if own not in names:
                raise ModelUnavailable(f"{checkpoint.files[0].parent} has lost the tensor {own} since it was loaded")
            return plain(names[own], tensors.read(names[own]))

        yield read


def _come_and_go(encoder: Encoder, slots: Mapping[str, Slot], source: Source) -> None:
    for path, part in encoder.stages():
        stage = _Stage({name: slots[name] for name in (f"{path}.{own}" for own in part.state_dict())}, source)
        part.register_forward_pre_hook(stage.bring)
        part.register_forward_hook(stage.drop, always_call=True)


class _Stage:
    """One part of an encoder, as its hooks see it."""

    def __init__(self, slots: Mapping[str, Slot], source: Source) -> None:
        self._slots, self._source = slots, source

    def bring(self, part: nn.Module, args: Any) -> None:
        with self._source() as read:
            for name, slot in self._slots.items():
                tensor = read(name)
                if not slot.takes(tensor):
                    raise ModelUnavailable(f"the file's tensor {name} has changed its shape since it was loaded")
                slot.fill(tensor)

    def drop(self, part: nn.Module, args: Any, result: Any) -> None:
        let_go(part)
