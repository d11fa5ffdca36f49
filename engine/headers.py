"""What the headers of safetensors files say of a checkpoint's size: nothing of the weights themselves is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferfleet.engine.model_errors import ModelUnavailable

#: No checkpoint has a longer one; a damaged file may claim anything.
MAX_HEADER_BYTES = 100 << 20


@dataclass
class StoredWeights:
    """The tensors of a checkpoint as they lie in its files."""

    num_bytes: int = 0
    #: The files' name of a number format -> how many numbers there are of it.
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, dtype: str, shape: Iterable[int], num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.numbers[dtype] = self.numbers.get(dtype, 0) + math.prod(shape)


def stored_weights(files: Iterable[Path]) -> StoredWeights:
    """Of all these files together. Raises ModelUnavailable for one that is damaged."""
    stored = StoredWeights()
    for path in files:
        try:
            for name, tensor in _header(path).items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    stored.add(tensor["dtype"], tensor["shape"], end - begin)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ModelUnavailable(f"{path} is not a readable safetensors file: {error}") from error
    return stored


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {size} bytes")
        header: dict[str, Any] = json.loads(file.read(size))
    return header
