"""Streams a quantised checkpoint module by module: the tensors of one weight are read together and given as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.model_errors import UnsupportedModel, WeightsMismatch
from inferfleet.engine.quantized.scheme import Scheme
from inferfleet.engine.weights import Checkpoint, plain


def weights_of(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[tuple[str, Weight]]:
    """(name, weight) as a plain checkpoint would name it; a weight's tensors may lie in different files.

    Raises WeightsMismatch for a weight of which a part is missing, UnsupportedModel for one that is not as its config
    says.
    """
    with checkpoint.by_name() as tensors:
        modules: dict[str, list[str]] = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last in scheme.members:
                modules.setdefault(module, []).append(last)
        done: set[str] = set()
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last in scheme.members:
                if module not in done:
                    done.add(module)
                    parts = {part: tensors.read(f"{module}.{part}") for part in modules[module]}
                    yield f"{module}.weight", _weight(scheme, module, parts)
            elif last not in scheme.unused:
                yield name, plain(name, tensors.read(name))


def _weight(scheme: Scheme, module: str, parts: Mapping[str, Tensor]) -> Weight:
    try:
        weight = scheme.weight(module, parts)
        return plain(f"{module}.weight", weight) if isinstance(weight, Tensor) else weight
    except KeyError as error:
        raise WeightsMismatch([f"{module}.{error.args[0]}"], [], []) from None
    except ValueError as error:
        raise UnsupportedModel(f"{module} ({scheme.name}): {error}") from error
