"""The images and the compose file, as far as can be seen without a container engine: what they name exists here."""

import configparser
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import free_port, missing
from fleet import Fleet, until
from typer.main import get_command

from inferfleet.tasks.settings import Settings, refuse_unknown_environment
from inferfleet.workers.checks import Standing, complaints_about
from inferfleet.workers.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = get_command(app).commands
#: What a reader of env.example fills in.
FILLED = {"REDIS_PASSWORD": "secret", "S3_STORE": "s3://bucket/prefix", "S3_ENDPOINT_URL": "https://s3.example",
          "S3_ACCESS_KEY_ID": "id", "S3_SECRET_ACCESS_KEY": "key"}  # fmt: skip


def instructions(text):
    """A Dockerfile as (stage, word, rest): comments out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stage, found = "", []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            stage = rest.split(" AS ")[1] if word == "FROM" else stage
            found.append((stage, word, rest.strip()))
    return found


DOCKERFILE = instructions((DOCKER / "Dockerfile").read_text())
FINAL = ("api", "worker")


def of(word, *stages):
    return [rest for stage, each, rest in DOCKERFILE if each == word and (not stages or stage in stages)]


def filled(text):
    """Compose's ${NAME:-default} and ${NAME:?needed}, from FILLED."""

    def value(found):
        name, _, default = found[1].partition(":")
        assert default or name in FILLED, f"{name} has neither a default nor a line in env.example"
        return FILLED.get(name, default.removeprefix("-"))

    return re.sub(r"\$\{([^}]+)\}", value, text)


def compose(name="compose.yaml"):
    return yaml.safe_load(filled((DOCKER / name).read_text()))


SERVICES = compose()["services"]
OURS = [name for name in SERVICES if name != "redis"]


def test_hadolint_has_no_complaint_about_the_dockerfile():
    binary = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if binary is None:
        missing("hadolint")
    command = [binary, "--config", "docker/hadolint.yaml", "--no-color", "docker/Dockerfile"]
    linted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (linted.stdout, linted.returncode) == ("", 0)


def test_every_copied_path_exists_and_is_in_the_build_context():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    for rest in of("COPY"):
        if not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and source in let_in
    assert not any(fnmatch.fnmatch("docker/.env", pattern) for pattern in let_in)


def test_the_images_hold_every_package_of_the_project_and_nothing_that_is_not_copied():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    for stage in ("build-api", "build-worker"):
        copied = {source for rest in of("COPY", stage) for source in rest.split()[:-1]}
        assert copied == {*packages, "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}


def test_every_base_is_pinned_or_a_stage_before():
    stages = set()
    (pinned,) = of("ARG", "")
    name, _, image = pinned.partition("=")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", image)
    for base, stage in (rest.split(" AS ") for rest in of("FROM")):
        assert base == f"${{{name}}}" or base in stages
        stages.add(stage)
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-alpine", SERVICES["redis"]["image"])


@pytest.mark.parametrize("stage", FINAL)
def test_a_final_image_has_a_user_without_rights_signals_that_arrive_and_a_health_check_of_our_own(stage):
    assert of("USER", "runtime", stage)[-1] == "10001:10001"
    (entry,), (command,) = map(json.loads, of("ENTRYPOINT", "runtime")), map(json.loads, of("CMD", stage))
    assert [entry, command] == [["tini", "--", "inferfleet"], [stage]]  # lists: no shell stands in a signal's way
    assert command[0] in COMMANDS
    (check,) = of("HEALTHCHECK", stage)
    assert json.loads(check.partition(" CMD ")[2]) == ["inferfleet", "health", stage]
    assert PROJECT["scripts"].keys() == {"inferfleet"}


def test_the_installed_extras_exist_and_torch_is_the_one_of_dev_py():
    commands = " ".join(of("RUN"))
    extras = {extra for listed in re.findall(r'"\.\[([\w,]+)\]"', commands) for extra in listed.split(",")}
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
    (torch,) = set(re.findall(r"torch==[\d.]+", commands))
    assert f'TORCH = "{torch}"' in (ROOT / "ops" / "dev.py").read_text()


def test_no_image_is_given_a_secret():
    text = " ".join(rest for _, word, rest in DOCKERFILE if word in ("ENV", "ARG"))
    assert not re.search(r"(?i)password|secret|token|key", text)


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.s3.yaml"]])
@pytest.mark.parametrize("name", OURS)
def test_a_service_s_environment_and_file_are_settings(name, files, monkeypatch, tmp_path):
    for file in files:
        for variable, value in compose(file)["services"].get(name, {}).get("environment", {}).items():
            monkeypatch.setenv(variable, value)
    for line in of("ENV", "runtime", *FINAL):
        for variable, value in re.findall(r"(INFERFLEET_\w+)=(\S+)", line):
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("INFERFLEET_CONFIG", str(DOCKER / "inferfleet.toml"))

    refuse_unknown_environment()
    settings = Settings()

    assert settings.redis_url == "redis://:secret@redis:6379/0"
    assert settings.result_store == ("s3://bucket/prefix" if len(files) == 2 and name != "webhooks" else "redis://")
    for model in settings.models.values():
        assert (ROOT / "ops" / Path(model.path).relative_to("/models")).is_dir()  # compose.yaml mounts ops/ there
    # what is left of the grace, after draining and the hand-back, is Docker's to kill in
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > settings.drain_grace_seconds + 10


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_runs_a_command_that_exists_from_an_image_that_is_built(name):
    service = SERVICES[name]
    build = service["build"]
    assert service["command"][0] in COMMANDS
    assert build["target"] in FINAL and (DOCKER / build["context"] / build["dockerfile"]).is_file()
    assert build.get("args", {}).keys() <= {arg.partition("=")[0] for arg in of("ARG")}
    check = service.get("healthcheck", {}).get("test", ["CMD", "inferfleet", "health", build["target"]])
    assert check == ["CMD", "inferfleet", "health", service["command"][0]]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_started_again_bounded_in_its_logs_and_without_rights(name):
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    if name != "redis":
        assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_the_redis_of_compose_is_one_that_the_workers_do_not_complain_about():
    command = SERVICES["redis"]["command"]
    assert command[0] == "redis-server"
    options = dict(zip(command[1::2], command[2::2], strict=True))
    standing = Standing(
        "7.4.5", options["--maxmemory-policy"], options["--appendonly"] == "yes", options["--appendfsync"]
    )
    assert complaints_about(standing) == []
    assert standing.durability == "at most the last second is lost"
    assert SERVICES["redis"]["networks"] == ["fleet"] and "ports" not in SERVICES["redis"]
    assert compose()["networks"]["fleet"]["internal"]


def test_a_real_redis_takes_the_options_of_compose(redis_binary_path, tmp_path):
    options = SERVICES["redis"]["command"][1:]
    command = [redis_binary_path, *options, "--port", "0", "--dir", str(tmp_path), "--unixsocket", str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        for line in server.stdout:
            if "ready to accept connections" in line.lower():
                break
        else:
            pytest.fail("it did not start")
        server.terminate()


def test_volumes_and_networks_that_services_use_are_declared_and_mounted_files_exist():
    top = compose()
    for service in SERVICES.values():
        assert set(service["networks"]) <= top["networks"].keys()
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in top["volumes"]


def test_gpus_are_reserved_with_room_in_shared_memory_and_only_one_worker_runs_by_profile():
    gpu = SERVICES["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["shm_size"] == "2gb"
    assert (SERVICES["worker"]["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])


def test_the_s3_file_adds_to_services_that_exist_what_all_of_them_need():
    added = compose("compose.s3.yaml")["services"]
    assert added.keys() == set(OURS) - {"webhooks"}  # webhooks carry no files
    assert len({json.dumps(service) for service in added.values()}) == 1


def test_env_example_names_every_variable_without_a_default():
    text = "".join((DOCKER / name).read_text() for name in ("compose.yaml", "compose.s3.yaml"))
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    named = set(re.findall(r"^(\w+)=", (DOCKER / "env.example").read_text(), re.M))
    assert not re.search(r"^\w+=.*#", (DOCKER / "env.example").read_text(), re.M)  # might be read as a value
    explained = set(re.findall(r"S3_\w+", (DOCKER / "compose.s3.yaml").read_text().partition("\n\n")[0]))
    assert needed <= named | explained


@contextmanager
def role(redis_url, name, **settings):
    """A role as its container runs it, and what its health check says."""
    env = {**os.environ, "INFERFLEET_REDIS_URL": redis_url, "INFERFLEET_NAMESPACE": "test"}
    env |= {f"INFERFLEET_{key.upper()}": str(value) for key, value in settings.items()}
    command = [sys.executable, "-m", "inferfleet.workers.cli"]

    def health():
        return subprocess.run([*command, "health", name], env=env, capture_output=True).returncode

    with subprocess.Popen([*command, name], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, health
        finally:
            process.kill()


@pytest.mark.parametrize(
    "name", ["batches", pytest.param("api", marks=pytest.mark.slow), pytest.param("webhooks", marks=pytest.mark.slow)]
)
def test_a_role_s_health_check_passes_while_it_runs_and_it_ends_at_sigterm(redis_url, name):
    settings = {"heartbeat_seconds": 0.5, "sweep_seconds": 0.2, "api_port": free_port()}
    with role(redis_url, name, **settings) as (process, health):
        until(lambda: health() == 0, 30)
        process.terminate()
        # uvicorn drains, and ends by the signal that asked it to
        assert process.wait(20) == (-signal.SIGTERM if name == "api" else 0)
        assert health() == (3 if name == "api" else 1)


@pytest.mark.slow
def test_a_worker_s_health_check_passes_while_it_runs(redis_url, tmp_path):
    fleet = Fleet(redis_url, tmp_path)
    try:
        worker = fleet.start_worker()
        env = {**os.environ, "INFERFLEET_REDIS_URL": redis_url, "INFERFLEET_NAMESPACE": "test"}
        command = [sys.executable, "-m", "inferfleet.workers.cli", "health", "worker"]
        until(lambda: subprocess.run(command, env=env, capture_output=True).returncode == 0, 30)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    finally:
        fleet.close()


def test_health_looks_for_a_role_of_this_machine_and_says_when_it_cannot_know(redis_url, ledger):
    ledger.put_role("batches", "b", {"host": "another"}, 60)
    with role(redis_url, "batches") as (process, health):
        process.kill()
        assert health() == 1
    with role("redis://127.0.0.1:1/0", "webhooks") as (process, health):
        assert health() == 3


def test_the_systemd_unit_runs_every_role_with_time_to_drain(monkeypatch):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    path = ROOT / "ops" / "systemd" / "inferfleet@.service"
    unit.read(path)
    service = unit["Service"]
    roles = re.findall(r"inferfleet@(\w+)", path.read_text().partition("\n\n")[0])

    assert set(roles) == {"api", "worker", "batches", "webhooks"} and set(roles) <= COMMANDS.keys()
    assert service["ExecStart"].endswith("/inferfleet %i") and service["KillMode"] == "mixed"
    for line in re.findall(r"^Environment=(INFERFLEET_\w+)=(.*)$", path.read_text(), re.M):
        monkeypatch.setenv(*line)
    monkeypatch.setenv("INFERFLEET_CONFIG", str(DOCKER / "inferfleet.toml"))
    refuse_unknown_environment()
    assert int(service["TimeoutStopSec"]) > Settings().drain_grace_seconds + 10
