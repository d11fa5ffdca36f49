"""The shape of the repository: packaging, arrows between rooms, sizes. Guards what no behaviour test would notice."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "workers", "engine", "kernels")
#: What each room may import of the others. `workers` reaches into the engine only where no torch is (see below).
ARROWS = {"tasks": set(), "workers": {"tasks", "engine"}, "engine": {"kernels"}, "kernels": set()}
#: The torch-free part of the engine: the API counts a prompt's tokens at the door with it.
DOOR = ("inferfleet.engine.text", "inferfleet.engine.sampling_params")


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path, *, run_time_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports anywhere; `run_time_only` leaves TYPE_CHECKING blocks out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if run_time_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_python_is_a_package_of_pyproject():
    folders = {path.parent.relative_to(ROOT) for path in sources(*ROOMS)}
    data = {path.parent.relative_to(ROOT) for path in [*ROOT.glob("tasks/lua/*.lua"), *ROOT.glob("kernels/csrc/*")]}
    expected = {"inferfleet." + ".".join(folder.parts) for folder in folders | data}
    assert expected == set(project()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("room", ROOMS)
def test_the_four_top_folders_hold_no_init_file(room):
    # A bare `kernels` is another project's package: with an __init__.py here, a checkout on sys.path would hide it.
    assert not (ROOT / room / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_along_the_arrows(room):
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(room)
        for name in imports(path)
        if name.startswith("inferfleet.") and name.split(".")[1] not in ARROWS[room] | {room}
    ]
    assert wrong == []


def test_rooms_import_each_other_by_their_full_names():
    wrong = [f"{path}: {name}" for path in sources(*ROOMS) for name in imports(path) if name.split(".")[0] in ROOMS]
    assert wrong == []


def test_workers_reach_only_the_torch_free_part_of_the_engine():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("workers")
        for name in imports(path)
        if name.startswith("inferfleet.engine") and not name.startswith(DOOR)
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["tasks", "workers"])
def test_tasks_and_workers_never_import_torch(room):
    wrong = [f"{path}: {name}" for path in sources(room) for name in imports(path) if name.split(".")[0] == "torch"]
    assert wrong == []


@pytest.mark.parametrize(
    "name",
    [
        "scheduler",
        "border",
        "blocks",
        "block_pool",
        "snapshots",
        "sight",
        "prefix",
        "request",
        "sampling_params",
        "text",
    ],
)
def test_the_hard_logic_of_the_engine_is_free_of_torch(name):
    entry = ROOT / "engine" / name
    files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry.with_suffix(".py")]
    assert files
    wrong = [f"{path}" for path in files if any(i.split(".")[0] == "torch" for i in imports(path, run_time_only=True))]
    assert wrong == []


def test_nothing_at_run_time_imports_transformers_or_pickle():
    banned = {"transformers", "pickle", "cloudpickle", "dill"}
    wrong = [f"{path}: {n}" for path in sources(*ROOMS) for n in imports(path) if n.split(".")[0] in banned]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "inferfleet.tasks.client",
        "inferfleet.workers.api.server",
        "inferfleet.workers.app",
        "inferfleet.workers.cli",
        "inferfleet.workers.host",
        "inferfleet.workers.turns",
        "inferfleet.workers.webhooks.process",
    ],
)
def test_importing_a_producer_or_a_worker_loads_no_torch(module):
    # Given a fresh interpreter, when the module is imported, then neither torch nor the engine's models are there.
    program = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_source_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(*ROOMS)
        if (lines := path.read_text().count("\n")) > (600 if path.parent.name == "models" else 500)
    }
    assert long == {}


def test_every_function_of_the_project_is_annotated_and_shorter_than_sixty_lines():
    wrong = []
    for path in [*sources(*ROOMS), ROOT / "ops" / "dev.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 60 or node.returns is None:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {size}")
    assert wrong == []


def test_no_test_hides_behind_another_name_of_the_same_function():
    # A second `def test_x` in one file silently replaces the first: it would never run.
    wrong = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        wrong += [f"{path.name}: {name}" for name in set(names) if names.count(name) > 1]
    assert wrong == []


def test_the_vendored_pip_has_the_bytes_that_dev_py_expects():
    sys.path.insert(0, str(ROOT / "ops"))
    try:
        import dev
    finally:
        sys.path.pop(0)
    assert hashlib.sha256(dev.PIP_WHEEL.read_bytes()).hexdigest() == dev.PIP_SHA256
