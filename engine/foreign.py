"""Weights that are not opened: pickles can run code, and the rest is another engine's format. Knows names only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
OTHERS = frozenset({".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx"})
#: A message names at most so many files.
FILES_SHOWN = 4


def foreign_weights(names: Iterable[str]) -> str:
    """Which of these files hold weights that are not read, why, and what to do; empty if none does."""
    found = sorted(name for name in names if PurePath(name).suffix.lower() in PICKLES | OTHERS)
    if not found:
        return ""
    rest = len(found) - FILES_SHOWN
    shown = ", ".join(found[:FILES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    pickles = any(PurePath(name).suffix.lower() in PICKLES for name in found)
    why = ", because opening a pickle can run code that is in it" if pickles else ""
    return (
        f"found {shown}: only safetensors are read{why}; take a repository or revision that has the model in"
        " safetensors, or convert it"
    )
