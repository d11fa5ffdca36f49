"""The command `inferfleet`. Commands import what they need when they run: `--help` and completion stay quick."""

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from inferfleet.tasks.errors import FleetError, SettingsError, SetupError
from inferfleet.tasks.settings import load_settings
from inferfleet.workers import (
    cli_batch,
    cli_dead_letters,
    cli_deliveries,
    cli_endpoints,
    cli_files,
    cli_jobs,
    cli_keys,
    cli_models,
    cli_queue,
)
from inferfleet.workers.cli_chat import chat
from inferfleet.workers.cli_health import health
from inferfleet.workers.cli_image import image
from inferfleet.workers.cli_login import login
from inferfleet.workers.cli_options import DataDir, Json, Models, data_dir, named_models
from inferfleet.workers.cli_output import EXIT_ERROR, err, exit_code, out, print_error
from inferfleet.workers.cli_quantize import quantize

#: The checkpoints that a checkout brings along.
DEMO_MODEL = Path(__file__).resolve().parent.parent / "ops" / "demo_model"
DEMO_IMAGE_MODEL = DEMO_MODEL.with_name("demo_image")
EXIT_INTERRUPTED = 130
#: The commands that run for as long as a fleet does stand together in the help.
FLEET = "A fleet's processes"
#: After the grace a worker still has to hand its jobs back.
HAND_BACK_SECONDS = 10.0
#: What the bare install leaves out -> the extra that brings it.
EXTRAS = {
    "fastapi": "api",
    "uvicorn": "api",
    "tokenizers": "api",
    "boto3": "s3",
    "prometheus_client": "worker",
    "torch": "worker",
    "huggingface_hub": "worker",
    "PIL": "image",
}


class NotInstalled(SetupError):
    """A part of inferfleet that this command needs is not installed."""

    code = "not_installed"


app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,  # its frames print locals, and those hold prompts
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A fleet of inference workers behind a queue.",
)
app.command()(chat)
app.command()(health)
app.command()(image)
app.command()(login)
app.command()(quantize)
app.add_typer(cli_batch.app, name="batch")
app.add_typer(cli_dead_letters.app, name="dead-letters")
app.add_typer(cli_deliveries.app, name="deliveries")
app.add_typer(cli_endpoints.app, name="endpoints")
app.add_typer(cli_files.app, name="files")
app.add_typer(cli_jobs.app, name="jobs")
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_queue.app, name="queue")


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """A fleet of inference workers behind a queue."""
    if version:
        out.print(metadata.version("inferfleet"), markup=False)
        raise typer.Exit


Host = Annotated[str | None, typer.Option("--host", help="Address to listen on (api_host).")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port to listen on (api_port).")]


@app.command(rich_help_panel=FLEET)
def up(
    model: Models = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the small models of the checkout, as `demo` and `demo-image`.")
    ] = False,
    host: Host = None,
    port: Port = None,
    data: DataDir = None,
    json: Json = False,
) -> None:
    """Run everything on this machine: Redis (unless one is set), API, worker, batches, webhooks. Ctrl-C drains it."""
    from inferfleet.workers.cli_report import JsonReport, TextReport
    from inferfleet.workers.embedded import free_port
    from inferfleet.workers.up import Plan, run_up

    settings = load_settings({"models": named_models(model), "api_host": host, "api_port": port, "data_dir": data})
    flags = [f"{name}={spec.path}" for name, spec in (named_models(model) or {}).items()]
    if demo or not settings.models:
        flags += [f"{name}={path}" for name, path in _demo_models().items()]
    waited = {name: spec.path for name, spec in settings.models.items() if spec.eager}
    plan = Plan(
        folder=data_dir(settings),
        models=waited | dict(flag.split("=", 1) for flag in flags),
        host=settings.api_host,
        port=settings.api_port or free_port(),
        redis_url=settings.redis_url if "redis_url" in settings.model_fields_set else None,
        namespace=settings.namespace,
        grace=settings.drain_grace_seconds + HAND_BACK_SECONDS,
        flags=tuple(part for flag in flags for part in ("--model", flag)),
    )
    run_up(plan, JsonReport() if json else TextReport())


@app.command(rich_help_panel=FLEET)
def api(model: Models = None, host: Host = None, port: Port = None) -> None:
    """Run the HTTP API. Needs no GPU and no model; --model lets it count prompts at the door."""
    from inferfleet.tasks.doorbell import Doorbell
    from inferfleet.workers import logs
    from inferfleet.workers.api.server import serve

    settings = load_settings({"models": named_models(model), "api_host": host, "api_port": port})
    logs.configure(settings.log_level, settings.log_format)
    serve(settings, Doorbell(settings.redis_url, settings.namespace).ring)


@app.command(rich_help_panel=FLEET)
def worker(model: Models = None) -> None:
    """Carry jobs: load the models, take turns from the queue until a signal."""
    from inferfleet.workers.worker import run_worker

    settings = load_settings({"models": named_models(model)})
    raise typer.Exit(run_worker(settings))


@app.command(rich_help_panel=FLEET)
def batches() -> None:
    """Run batches of /v1/batches: hand their lines to the queue, write their files. Needs no GPU and no model."""
    from inferfleet.workers import logs
    from inferfleet.workers.batches.runner import run_batches

    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)
    run_batches(settings)


@app.command(rich_help_panel=FLEET)
def webhooks() -> None:
    """Send webhooks: what becomes of jobs, to whoever asked to be told. Needs no model and no GPU."""
    from inferfleet.workers.webhooks.process import run_webhooks

    raise typer.Exit(run_webhooks(load_settings()))


def _demo_models() -> dict[str, Path]:
    """What `--demo` serves by name; a line on stderr where the image model's packages are missing."""
    if not (DEMO_MODEL / "config.json").is_file():
        raise SettingsError(
            "no model to serve: there is none in the settings and this installation brings no demo model; "
            "give --model NAME=PATH",
            param="models",
        )
    models = {"demo": DEMO_MODEL}
    absent = [name for name in ("diffusers", "PIL") if find_spec(name) is None]
    if absent:
        err.print(
            f"demo-image is left out: it needs {absent[0]}; install it with pip install 'inferfleet[image]'",
            markup=False,
        )
    else:
        models["demo-image"] = DEMO_IMAGE_MODEL
    return models


def main() -> None:
    """Runs a command; every FleetError becomes a few clear lines and an exit code, never a trace."""
    try:
        app(prog_name="inferfleet")
    except FleetError as error:
        print_error(error)
        sys.exit(exit_code(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print_error(NotInstalled(f"this command needs {error.name}; install it with pip install 'inferfleet[{extra}]'"))
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
