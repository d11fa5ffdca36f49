"""Compiles csrc/*.cpp with the machine's own C++ compiler on first use, and binds the functions with ctypes.

The library lies in the user's cache folder, named by a hash of everything it was made from (sources, compiler, flags,
CPU), so one build serves every Python and every torch and is never stale. Without a compiler the reference runs; a
compile that fails is logged and kept in `status()`, because that is a fault and not a missing tool.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: a NaN must stay a NaN. Sums that may be reordered say so themselves (omp simd reduction).
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
COMPILE_SECONDS = 300

Functions = Mapping[tuple[str, torch.dtype], Callable[..., int]]

_state = "not tried"


class CompileError(RuntimeError):
    """The C++ compiler refused the kernels."""


def status() -> str:
    """What became of the C++ path: "ready (<path>)", "no compiler (...)" or "failed: <the compiler's words>".

    Tries it first, so this may compile for some seconds.
    """
    library()
    return _state


def bind(signatures: Mapping[str, Sequence[Any]]) -> Functions | None:
    """(name, dtype) -> C function, whose symbols are <name>_f32 and <name>_bf16; None without a C++ path.

    signatures gives the ctypes argument types of each name; a result, if any, is an int64.
    """
    loaded = library()
    if loaded is None:
        return None
    functions: dict[tuple[str, torch.dtype], Callable[..., int]] = {}
    for name, arguments in signatures.items():
        for dtype, suffix in SUFFIXES.items():
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = list(arguments), ctypes.c_int64
            functions[name, dtype] = function
    return functions


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for a result like x, contiguous whatever x is; the cheapest such call of torch."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None when they cannot be had; `status()` then says why."""
    global _state
    compiler = find_compiler()
    if compiler is None:
        _state = f"no compiler ({', '.join(COMPILERS)} not on PATH)"
        return None
    try:
        path = compiled(compiler)
        loaded = ctypes.CDLL(str(path))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # CompileError, or no home folder
        _state = f"failed: {error}"
        log.error("the C++ kernels failed, the slower references run instead: %s", error)
        return None
    _state = f"ready ({path})"
    return loaded


def find_compiler() -> str | None:
    """Path of the first known C++ compiler on PATH; $CXX comes first."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path:
    """Where compiled kernels live: $XDG_CACHE_HOME/inferfleet/kernels, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferfleet" / "kernels"


def compiled(compiler: str) -> Path:
    """Path of the library, compiled now if the cache has none of these sources, compiler, flags and CPU."""
    folder = cache_folder()
    target = folder / f"kernels-{_key(compiler)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not target.exists():
            _compile(compiler, target)
    return target


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [compiler, version, *FLAGS, _cpu()]
    parts += [part for path in sorted(SOURCES.iterdir()) for part in (path.name, path.read_text())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """Instruction sets of this CPU: a home folder shared by unlike machines must not share -march=native code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, target: Path) -> None:
    """Objects side by side, then one library, moved into place whole: another process never sees half of it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        linked = f"{scratch}/{target.name}"
        _run([compiler, "-shared", "-pthread", *objects, "-o", linked])
        os.replace(linked, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode != 0:
        raise CompileError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[:2000]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process compiles, the others wait for it; the lock dies with its holder."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
