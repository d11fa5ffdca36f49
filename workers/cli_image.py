"""`inferfleet image`: a picture from a prompt, painted by a job of the fleet and saved here."""

import base64
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from inferfleet.tasks import names
from inferfleet.tasks.errors import AlreadyTerminal, FleetError, from_dict
from inferfleet.tasks.picture_header import NoPicture, read_header
from inferfleet.workers.cli_http import ApiClient, ApiUnreachable
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client, complete_models, pick_model
from inferfleet.workers.cli_output import EXIT_JOB, err, out, print_error, print_json
from inferfleet.workers.cli_painting import View, check_previews, view_for_stderr
from inferfleet.workers.cli_saving import Target, finish, refuse_mixed

#: Seconds between two looks at a job that waits; it waits longer the longer it has waited.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

PICTURE, START, JOB = "Picture", "Starting picture", "Job"

Prompt = Annotated[str, typer.Argument(help="What to paint; - reads it from the standard input.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where to; its ending is the format. - is stdout, default JOB_ID.png."
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Which model paints.", autocompletion=complete_models)]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Such as 1024x768.", rich_help_panel=PICTURE)]
Side = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", rich_help_panel=PICTURE)]
Count = Annotated[
    int | None,
    typer.Option("-n", min=1, help="Pictures, from seed, seed + 1, ...; saved as FILE-0, ...", rich_help_panel=PICTURE),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.", rich_help_panel=PICTURE)]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", min=0, help="How closely to follow the prompt (dev models).", rich_help_panel=PICTURE),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="The same seed gives the same picture.", rich_help_panel=PICTURE)
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="png|jpeg|webp", help="Against the ending.", rich_help_panel=PICTURE)
]
Compression = Annotated[
    int | None,
    typer.Option("--quality", min=0, max=100, help="Of jpeg and webp, 0 to 100.", rich_help_panel=PICTURE),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="NAME[:SCALE]", help="An adapter of the model, how much of it.", rich_help_panel=PICTURE
    ),
]
Embed = Annotated[
    bool,
    typer.Option("--embed-prompt", help="Write the prompt into the PNG, not only its hash.", rich_help_panel=PICTURE),
]
Image = Annotated[
    Path | None,
    typer.Option("--image", metavar="FILE", help="Start from this PNG, JPEG or WebP.", rich_help_panel=START),
]
Strength = Annotated[float | None, typer.Option(help="How much of it changes, above 0 up to 1.", rich_help_panel=START)]
Preview = Annotated[
    int | None,
    typer.Option("--preview", metavar="K", min=1, help="Show how it stands every K steps.", rich_help_panel=JOB),
]
Priority = Annotated[int | None, typer.Option(min=-100, max=100, help="Lower runs first.", rich_help_panel=JOB)]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Print the job's id and leave; see `jobs output`.", rich_help_panel=JOB)
]


def image(
    prompt: Prompt,
    output: Output = None,
    model: Model = None,
    size: Size = None,
    width: Side = None,
    height: Side = None,
    n: Count = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    format: Format = None,
    quality: Compression = None,
    lora: Loras = None,
    embed_prompt: Embed = False,
    image: Image = None,
    strength: Strength = None,
    preview: Preview = None,
    priority: Priority = None,
    no_wait: NoWait = False,
    json: Json = False,
    api_url: ApiUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Paint a picture. Ctrl-C cancels the job. An existing file is replaced once the new picture is whole."""
    target = Target(output)
    _check_options(target, n or 1, image=image, strength=strength, no_wait=no_wait, json=json)
    body = {
        "prompt": sys.stdin.read().strip() if prompt == "-" else prompt,
        "size": size, "width": width, "height": height, "n": n, "num_inference_steps": steps,
        "guidance_scale": guidance, "seed": seed, "output_format": format or target.format(),
        "output_compression": quality, "loras": [_adapter(text) for text in lora or ()] or None,
        "embed_prompt": embed_prompt or None, "strength": strength, "preview_every": preview, "priority": priority,
        "image": None if image is None else _data_url(image),
    }  # fmt: skip
    body = {name: value for name, value in body.items() if value is not None}
    view = None if no_wait else view_for_stderr
    if preview and view is not None and err.is_terminal:
        check_previews()
    with api_client(api_url, api_key) as client:
        body = {"model": pick_model(client, model, kind="image"), **body}
        url = names.IMAGES_URL if image is None else names.EDITS_URL
        job = client.request("POST", url, body=body, headers={"prefer": "respond-async"})
        if view is None:
            print_json(job) if json else out.print(job["id"], markup=False)
            return
        job = _follow(client, job, view())
        if job["status"] == "completed":
            finish(client, job, target, json=json)
            return
    print_json(job) if json else print_error(from_dict(job["error"] or {}))
    raise typer.Exit(EXIT_JOB)


def _check_options(
    target: Target, count: int, *, image: Path | None, strength: float | None, no_wait: bool, json: bool
) -> None:
    if strength is not None and image is None:
        raise typer.BadParameter(
            "strength says how much of a starting picture changes: give --image", param_hint="--strength"
        )
    if no_wait and target.path is not None:
        raise typer.BadParameter("nothing is saved now: save it later with `jobs output`", param_hint="-o")
    refuse_mixed(target, json=json)
    target.check(count)


def _adapter(text: str) -> dict[str, Any]:
    """NAME or NAME:SCALE; a name may hold colons, as long as no number follows the last."""
    name, found, scale = text.rpartition(":")
    try:
        return {"name": name, "scale": float(scale)} if found else {"name": text}
    except ValueError:
        return {"name": text}


def _data_url(path: Path) -> str:
    try:
        data = path.read_bytes()
        kind = read_header(data).content_type
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror or error}", param_hint="--image") from None
    except NoPicture as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--image") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _follow(client: ApiClient, job: dict[str, Any], view: View) -> dict[str, Any]:
    """The job when it has ended; Ctrl-C cancels it."""
    path = f"/v1/jobs/{job['id']}"
    pause, seen = SHORTEST_PAUSE, -1
    try:
        while job["status"] == "queued":
            view.waits(job)
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 1.3 * pause)
            job = client.request("GET", path)
        while True:
            # A stream may end before its job does: its API shuts down, and another one goes on.
            for event in client.stream("GET", f"{path}/events?starting_after={seen}"):
                seen = event["sequence_number"]
                _show(view, event)
            job = client.request("GET", path)
            if job["status"] in names.TERMINAL:
                return job
    except KeyboardInterrupt:
        _cancel(client, path)
        raise
    except ApiUnreachable:
        err.print(f"[dim]the job goes on: inferfleet jobs output {job['id']}[/]")
        raise
    finally:
        view.close()


def _show(view: View, event: dict[str, Any]) -> None:
    if event["type"] == names.PROGRESS:
        view.step(event["step"], event["steps"])
    elif event["type"] == names.PREVIEW:
        view.preview(event)


def _cancel(client: ApiClient, path: str) -> None:
    try:
        client.request("POST", f"{path}/cancel")
        err.print("[dim]cancelled the job[/]")
    except AlreadyTerminal:
        pass
    except FleetError as error:
        print_error(error)
