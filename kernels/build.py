"""Compiles csrc/<op>.cpp with the machine's own C++ compiler on first use, and binds it with ctypes.

The library lies in the user's cache folder, named by a hash of everything it was made from (source, compiler, flags,
CPU, OpenMP runtime), so a build serves every Python and every torch and is never stale. Without a compiler the
reference runs; a compile that fails is logged and kept in `status()`, because that is a fault and not a missing tool.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: a NaN must stay a NaN. Sums that may be reordered say so themselves (omp simd reduction).
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
COMPILE_SECONDS = 300
MIN_PARALLEL_ELEMENTS = 32768

Functions = Mapping[tuple[str, torch.dtype], Callable[..., int]]

#: What became of each op's C++ path: "ready (<path>)", "no compiler (...)" or "failed: <the compiler's words>".
_states: dict[str, str] = {}


class CompileError(RuntimeError):
    """The C++ compiler refused a kernel."""


def status() -> dict[str, str]:
    """Op -> state of its C++ path; every op is tried first, so this may compile for some seconds."""
    for source in sorted(SOURCES.glob("*.cpp")):
        library(source.stem)
    return dict(_states)


def bind(op: str, signatures: Mapping[str, Sequence[Any]]) -> Functions | None:
    """(name, dtype) -> C function of csrc/<op>.cpp, whose symbols are <name>_f32 and <name>_bf16.

    signatures gives the ctypes argument types of each name; a result, if any, is an int64. None when the op has no
    C++ path here.
    """
    loaded = library(op)
    if loaded is None:
        return None
    functions: dict[tuple[str, torch.dtype], Callable[..., int]] = {}
    for name, arguments in signatures.items():
        for dtype, suffix in SUFFIXES.items():
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = list(arguments), ctypes.c_int64
            functions[name, dtype] = function
    return functions


@functools.cache
def library(op: str) -> ctypes.CDLL | None:
    """The compiled csrc/<op>.cpp, or None when it cannot be had; `status()` then says why."""
    compiler = find_compiler()
    if compiler is None:
        _states[op] = f"no compiler ({', '.join(COMPILERS)} not on PATH)"
        return None
    try:
        path = compiled(op, compiler)
        loaded = ctypes.CDLL(str(path))
    except (CompileError, OSError, subprocess.SubprocessError) as error:
        _states[op] = f"failed: {error}"
        log.error("kernel %s: the C++ path failed, the slower reference runs instead: %s", op, error)
        return None
    _states[op] = f"ready ({path})"
    return loaded


def threads_for(elements: int) -> int:
    """How many threads an elementwise kernel should use: waking a second one costs more than a small row."""
    return torch.get_num_threads() if elements >= MIN_PARALLEL_ELEMENTS else 1


def find_compiler() -> str | None:
    """Path of the first known C++ compiler on PATH; $CXX comes first."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    return None


def cache_folder() -> Path:
    """Where compiled kernels live: $XDG_CACHE_HOME/inferfleet/kernels, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferfleet" / "kernels"


def compiled(op: str, compiler: str) -> Path:
    """Path of the op's library, compiled now if the cache has none of this source, compiler, flags and CPU."""
    runtime = openmp_runtime()
    folder = cache_folder()
    target = folder / f"{op}-{_key(op, compiler, runtime)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{op}.lock"):
        if not target.exists():
            _compile(op, compiler, runtime, target)
    return target


def _key(op: str, compiler: str, runtime: str | None) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [compiler, version, *FLAGS, runtime or "serial", _cpu()]
    parts += [path.read_text() for path in (SOURCES / f"{op}.cpp", *sorted(SOURCES.glob("*.h")))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """Instruction sets of this CPU: a home folder shared by unlike machines must not share -march=native code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded, or None.

    Linking against that very file keeps one pool of threads in the process. Two pools would spin on the same cores.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[.\d]*)", maps)))
    inside_torch = [path for path in found if "/torch" in path]
    return (inside_torch or found or [None])[0]


def _compile(op: str, compiler: str, runtime: str | None, target: Path) -> None:
    """Compile, then link apart: -fopenmp at the link would pull in the compiler's own OpenMP runtime."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled_object, linked = Path(scratch) / f"{op}.o", Path(scratch) / target.name
        threads = ["-fopenmp"] if runtime else ["-fopenmp-simd"]
        source = str(SOURCES / f"{op}.cpp")
        _run([compiler, *FLAGS, *threads, "-c", source, "-o", str(compiled_object)])
        _run([compiler, "-shared", str(compiled_object), *([runtime] if runtime else []), "-o", str(linked)])
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
