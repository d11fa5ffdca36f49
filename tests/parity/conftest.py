"""Checkpoints and models that the parity tests share: each is written and loaded once in a session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from parity.device import DEVICE

from inferfleet.engine.families import Model, load_model

if TYPE_CHECKING:
    from parity.checkpoints.writing import Reference

if importlib.util.find_spec("transformers") is None and os.environ.get("CI") != "true":
    collect_ignore_glob = ["test_*.py"]  # no judge on this machine; under CI the import fails loudly instead


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Callable[..., Reference]:
    """reference(name, seed, **how to write it): the judge; its `folder` is the checkpoint."""
    from parity.checkpoints.writing import write

    written: dict[tuple, Reference] = {}

    def get(name: str, seed: int, **how) -> Reference:
        key = (name, seed, *sorted(how.items(), key=str))
        if key not in written:
            folder: Path = tmp_path_factory.mktemp(f"{name}-{seed}-")
            written[key] = write(name, seed, folder, **how)
        return written[key]

    return get


@pytest.fixture(scope="session")
def load() -> Callable[..., Model]:
    """load(folder, dtype): our model of a checkpoint, in float32 unless told otherwise."""
    loaded: dict[tuple, Model] = {}

    def get(folder: Path, dtype: str = "float32") -> Model:
        if (folder, dtype) not in loaded:
            loaded[folder, dtype] = load_model(str(folder), dtype=dtype, device=str(DEVICE)).model
        return loaded[folder, dtype]

    return get
