"""The two commands of README, on a bare machine: `python3 ops/dev.py demo` and `python3 ops/dev.py test`.

Standard library only, because nothing is installed when it runs. It makes `.venv`, installs the project into
it and then hands over to the project's own commands; it knows nothing of jobs, models or engines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
#: Bootstraps pip where Debian ships neither pip nor ensurepip; kept in the tree so that its bytes are known.
PIP_WHEEL = ROOT / "ops" / "vendor" / "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
#: torch goes in first and alone: whatever depends on it must find it there and not fetch another build.
TORCH = "torch==2.13.0"
RUN_EXTRAS = ("api", "worker", "image", "embedded")
#: Where the demo leaves its picture.
PICTURE = ROOT / "demo.png"
TEST_EXTRAS = (*RUN_EXTRAS, "s3", "dev", "oracle")
DEMO_QUESTIONS = ("What is 38 + 45?", "Spell the word queue.", "Where does the truth about jobs live?")
DEMO_PROMPT = "a red circle on a blue background"
DEMO_MODELS = {"demo", "demo-image"}
READY_SECONDS = 180.0


class DevError(Exception):
    """A problem the reader can act on: printed as one line, without a traceback."""


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Print what is being done, and how many seconds it took."""
    started = time.monotonic()
    print(f"  {name} ...", flush=True)
    yield
    print(f"  {name}: {time.monotonic() - started:.1f} s", flush=True)


def run(command: list[str | Path]) -> None:
    """Run a command; its failure is ours."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode:
        raise DevError(f"`{' '.join(str(part) for part in command)}` ended with status {done.returncode}")


def run_quietly(command: list[str | Path]) -> None:
    """Run a command whose words matter only if it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise DevError(f"{done.stdout[-4000:]}\n`{' '.join(words)}` ended with status {done.returncode}")


def pip_works() -> bool:
    """A half-made .venv has a python but no pip; only pip's own answer counts."""
    if not PYTHON.exists():
        return False
    return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def make_venv() -> None:
    """Create .venv with a working pip, with or without ensurepip on the machine."""
    if pip_works():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, check=False)
    if made.returncode == 0 and pip_works():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    run_quietly([sys.executable, "-m", "venv", "--without-pip", VENV])
    if hashlib.sha256(PIP_WHEEL.read_bytes()).hexdigest() != PIP_SHA256:
        raise DevError(f"{PIP_WHEEL.relative_to(ROOT)} is damaged: its SHA-256 is not {PIP_SHA256}")
    run_quietly([PYTHON, PIP_WHEEL / "pip", "install", "--quiet", "--no-index", PIP_WHEEL])


def warn_about_torch() -> None:
    """Say what the download costs before it starts: an index may offer only the CUDA build."""
    if not Path("/dev/nvidia0").exists() and not shutil.which("nvidia-smi"):
        print(
            "  no GPU driver seen: a CPU build of torch (about 200 MB) is enough. If your package index\n"
            "  offers only the CUDA build, this downloads about 2.7 GB; point PIP_INDEX_URL or\n"
            "  PIP_FIND_LINKS at one that has the CPU build to avoid that.",
            flush=True,
        )


def install(extras: tuple[str, ...]) -> None:
    """Install the project with `extras`, editable; nothing to do while pyproject is the same."""
    stamp = VENV / "inferfleet-installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    have = stamp.read_text().split() if stamp.exists() else []
    if pip_works() and have[:1] == [wanted] and set(extras) <= set(have[1:]):
        return
    with phase("making .venv"):
        make_venv()
    pip: list[str | Path] = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([PYTHON, "-c", "import torch"], capture_output=True, check=False).returncode:
        warn_about_torch()
        with phase(f"installing {TORCH}"):
            run_quietly([*pip, TORCH])
    with phase("installing inferfleet"):
        run_quietly([*pip, "--editable", f"{ROOT}[{','.join(extras)}]"])
    stamp.write_text(" ".join((wanted, *extras)))


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serves_the_models(url: str) -> bool:
    """Whether the API at `url` accepts jobs and a worker has loaded both demo models."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            return set(json.load(answer)["models"]) >= DEMO_MODELS
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_ready(fleet: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the API says that both models are ready to answer.

    Raises:
        DevError: the fleet ended or was not ready within READY_SECONDS; carries the end of its log.
    """
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if fleet.poll() is not None:
            break
        if serves_the_models(url):
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    raise DevError(f"the fleet did not become ready; the end of its log:\n{tail}")


def stop(fleet: subprocess.Popen[bytes]) -> None:
    """Drain the fleet, and kill it only if it does not end by itself."""
    fleet.send_signal(signal.SIGTERM)
    try:
        fleet.wait(timeout=40)
    except subprocess.TimeoutExpired:
        fleet.kill()
        fleet.wait()


def demo(_: argparse.Namespace) -> None:
    """Start Redis, the API and a worker on this machine, ask three questions, have a picture painted and stop."""
    started = time.monotonic()
    install(RUN_EXTRAS)
    url = f"http://127.0.0.1:{free_port()}"
    cli = VENV / "bin" / "inferfleet"
    with tempfile.TemporaryDirectory(prefix="inferfleet-demo-") as folder:
        log = Path(folder) / "up.log"
        with log.open("wb") as sink:
            command = [cli, "up", "--demo", "--port", url.rpartition(":")[2], "--data-dir", folder]
            fleet = subprocess.Popen([str(part) for part in command], stdout=sink, stderr=sink, cwd=folder)
        try:
            with phase("starting Redis, API, worker and engine"):
                wait_ready(fleet, url, log)
            for question in DEMO_QUESTIONS:
                print(f"\n> {question}", flush=True)
                run([cli, "chat", "--api-url", url, "--temperature", "0", question])
            print(f"\n> paint {DEMO_PROMPT}", flush=True)
            run([cli, "image", DEMO_PROMPT, "-o", PICTURE, "--api-url", url, "--model", "demo-image"])
        finally:
            stop(fleet)
    print(f"\nDone in {time.monotonic() - started:.1f} s. `.venv/bin/inferfleet up --demo` keeps it running.")


def test(options: argparse.Namespace) -> None:
    """Install the test extras and run the suite; `--all` adds what is marked slow."""
    install(TEST_EXTRAS)
    # Some at once, since many wait for servers and processes; `-n 0` among the options runs one after another.
    at_once = min(4, os.cpu_count() or 1)
    command: list[str | Path] = [PYTHON, "-m", "pytest", "-n", str(at_once), *options.rest]
    if not options.all:
        command += ["-m", "not slow and not gpu"]
    os.execv(PYTHON, [str(part) for part in command])


def check(_: argparse.Namespace) -> None:
    """Format, lint, types and tests, as `ops/check` runs them."""
    install(TEST_EXTRAS)
    run(["bash", ROOT / "ops" / "check"])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops/dev.py", description="Everything from a fresh clone.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in (demo, test, check):
        entry = verbs.add_parser(verb.__name__, help=(verb.__doc__ or "").splitlines()[0])
        entry.set_defaults(run=verb)
        if verb is test:
            entry.add_argument("--all", action="store_true", help="also the long soaks and the whole parity matrix")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb != "test":
        parser.error(f"unknown argument: {rest[0]}")
    options.rest = rest
    return options


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets a sentence, not a traceback
        print(f"inferfleet needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    options = parse(sys.argv[1:])
    try:
        options.run(options)
    except DevError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
