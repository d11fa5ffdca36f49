"""Finds the kernels in Triton, which run on CUDA alone and are imported only there: importing Triton takes a while."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(name: str, x: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The module of that name in this package, for x on CUDA and others of the same of DTYPES; else None.

    None too where Triton is not installed; it comes with torch for CUDA.
    """
    if not x.is_cuda or x.dtype not in DTYPES or any(y is not None and y.dtype is not x.dtype for y in others):
        return None
    return _module(name)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _module(name: str) -> ModuleType | None:
    if not has_triton():
        return None
    return importlib.import_module(f"inferfleet.kernels.{name}")
