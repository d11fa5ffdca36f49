"""What the machine of a benchmark is, and its limits measured in the same run: memory and matrix rates."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device(name: str) -> torch.device:
    """The device of that name; "auto" is a CUDA device if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, thread count, versions and load: what a figure means nothing without."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds(work: Callable[[], object], device: torch.device, passes: int) -> dict[str, float]:
    """Median and best time of `work`, which has run once before to warm up."""
    work()
    taken = []
    for _ in range(passes):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return {"median": statistics.median(taken), "best": min(taken)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: Of a tensor that no cache holds, and the side of a product that keeps every unit of the device busy.
NUM_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
SIDE = {"cpu": 2048, "cuda": 8192}


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a large copy; the best of five."""
    num_bytes = NUM_BYTES[device.type]
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device, 5)["best"]


def read_rate(device: torch.device) -> float:
    """Bytes read per second by a sum over a large tensor; the best of five."""
    num_bytes = NUM_BYTES[device.type]
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / seconds(source.sum, device, 5)["best"]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product; the best of five."""
    size = SIDE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)["best"]
