"""The compiled kernels' cache: what is compiled when, and what is said when it cannot be."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from inferfleet.kernels import build, linear, rms_norm, threads

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler on PATH")


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """An empty cache folder, two small sources instead of all, and no library remembered from before."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("numeric.h", "norm.h", "pool.h", "pool.cpp", "rms_norm.cpp"):
        (sources / name).write_bytes((build.SOURCES / name).read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_state", "not tried")
    monkeypatch.setattr(build, "SOURCES", sources)
    forget()
    yield tmp_path
    forget()


def forget():
    build.library.cache_clear()
    rms_norm._native.cache_clear()


def norm_works():
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))


@needs_compiler
def test_the_kernels_are_compiled_once_into_the_cache_folder(fresh_build):
    norm_works()
    (library,) = fresh_build.rglob("*.so")
    made = library.stat().st_mtime_ns
    forget()

    norm_works()

    assert build.status() == f"ready ({library})"
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_the_reference_runs_and_the_status_says_so(fresh_build, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh_build))
    monkeypatch.delenv("CXX", raising=False)

    norm_works()

    assert build.status().startswith("no compiler")


def test_a_compiler_that_fails_is_reported_in_its_own_words(fresh_build, monkeypatch, caplog):
    broken = fresh_build / "g++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such instruction' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))

    norm_works()

    assert build.status().startswith("failed: ")
    assert "no such instruction" in build.status()
    assert "no such instruction" in caplog.text
    assert not list(fresh_build.rglob("*.so"))


@needs_compiler
def test_processes_that_build_at_once_all_get_a_whole_library(fresh_build):
    code = (
        "import pathlib, sys\n"
        "from inferfleet.kernels import build\n"
        f"build.SOURCES = pathlib.Path({str(build.SOURCES)!r})\n"
        "sys.exit(build.library() is None)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], env=os.environ) for _ in range(3)]

    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list(fresh_build.rglob("*.so"))) == 1


@needs_compiler
def test_another_source_or_flag_is_another_library(fresh_build, monkeypatch):
    compiler = build.find_compiler()
    before = build._key(compiler)
    (build.SOURCES / "norm.h").write_text("// changed\n")
    changed = build._key(compiler)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))

    assert len({before, changed, build._key(compiler)}) == 3


@needs_compiler
def test_the_kernels_of_this_machine_are_ready():
    assert build.status().startswith("ready"), build.status()


@needs_compiler
def test_the_kernels_may_have_more_threads_than_torch(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_count", None)
    packed, x = linear.PackedLinear(torch.randn(300, 64)), torch.randn(7, 64)
    expected = packed(x)

    threads.use(3)

    assert (threads.for_work(), torch.get_num_threads()) == (3, 1)
    assert (threads.for_elements(100), threads.for_elements(10**6)) == (1, 3)
    assert torch.equal(packed(x), expected)
    linear.PackedLinear(torch.randn(8, 8).half())  # a product that torch has to do
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_no_threads_at_all_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        threads.use(0)


@needs_compiler
def test_many_threads_may_multiply_at_once_and_with_any_number_of_helpers():
    before = torch.get_num_threads()
    packed = linear.PackedLinear(torch.randn(300, 64))
    inputs = [torch.randn(7, 64) for _ in range(6)]
    expected = [packed(x) for x in inputs]
    wrong = []

    def multiply(number):
        torch.set_num_threads(1 + number % 4)
        for _ in range(200):
            if not torch.equal(packed(inputs[number]), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=multiply, args=[number]) for number in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    torch.set_num_threads(before)

    assert wrong == []
