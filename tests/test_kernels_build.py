"""The compiled kernels' cache: what is compiled when, and what is said when it cannot be."""

import os
import subprocess
import sys

import pytest
import torch

from inferfleet.kernels import build, rms_norm


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """An empty cache folder, and no library remembered from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_states", {})
    build.library.cache_clear()
    rms_norm._native.cache_clear()
    yield tmp_path
    build.library.cache_clear()
    rms_norm._native.cache_clear()


needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler on PATH")


def norm_works():
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))


@needs_compiler
def test_a_kernel_is_compiled_once_into_the_cache_folder(fresh_build):
    norm_works()
    (library,) = fresh_build.rglob("*.so")
    made = library.stat().st_mtime_ns
    build.library.cache_clear()

    assert build.library("rms_norm") is not None
    assert library.stat().st_mtime_ns == made
    assert build._states["rms_norm"] == f"ready ({library})"


def test_without_a_compiler_the_reference_runs_and_the_status_says_so(fresh_build, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh_build))
    monkeypatch.delenv("CXX", raising=False)

    norm_works()

    assert build._states["rms_norm"].startswith("no compiler")


def test_a_compiler_that_fails_is_reported_in_its_own_words(fresh_build, monkeypatch, caplog):
    broken = fresh_build / "g++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such instruction' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))

    norm_works()

    assert build._states["rms_norm"].startswith("failed: ")
    assert "no such instruction" in build._states["rms_norm"]
    assert "no such instruction" in caplog.text
    assert not list(fresh_build.rglob("*.so"))


@needs_compiler
def test_two_processes_that_build_at_once_both_get_a_whole_library(fresh_build):
    code = "from inferfleet.kernels import build; assert build.library('gated_activation') is not None"
    environment = {**os.environ, "XDG_CACHE_HOME": str(fresh_build)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]

    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list(fresh_build.rglob("*.so"))) == 1


@needs_compiler
def test_another_source_is_another_library(fresh_build, monkeypatch):
    compiler = build.find_compiler()
    before = build._key("rms_norm", compiler, None)
    copy = fresh_build / "csrc"
    copy.mkdir()
    for source in build.SOURCES.iterdir():
        (copy / source.name).write_text(source.read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", copy)

    assert build._key("rms_norm", compiler, None) != before
    assert build._key("rms_norm", compiler, "/another/libgomp.so") != build._key("rms_norm", compiler, None)


@needs_compiler
def test_every_kernel_of_this_machine_is_ready():
    states = build.status()

    assert set(states) == {path.stem for path in build.SOURCES.glob("*.cpp")}
    assert all(state.startswith("ready") for state in states.values()), states
