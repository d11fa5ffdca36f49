"""`inferfleet quantize`: what coding its weights costs a model, and the coded model as a folder of its own."""

import json as jsonlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from inferfleet.tasks.errors import SetupError
from inferfleet.workers.cli_options import Json
from inferfleet.workers.cli_output import out, print_json, print_table

#: Weights are the engine's business, and so is torch: the work is done by a process of its own.
QUANTISER = (sys.executable, "-m", "inferfleet.engine.quality")
#: After a Ctrl-C, for the removal of what is half written.
CLEAN_UP_SECONDS = 60.0
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class QuantizeFailed(SetupError):
    """The model cannot be quantised, or its report not be written."""

    code = "quantize_failed"


def quantize(
    path: Annotated[str, typer.Argument(help="A model's folder in full precision, or a hub id.")],
    quantization: Annotated[
        Literal["int8", "int4", "fp8"], typer.Option("--quantization", "-q", help="What the weights become.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the coded model to this new folder.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Where the report goes, if not beside the model.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Texts to compare over, one a line.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:0.")] = "auto",
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit of the hub id.")] = None,
    json: Json = False,
) -> None:
    """Compare a model with itself under coded weights: texts, probabilities, routes, bytes. -o writes the coded model.

    It is served like any other: give its folder as a model's path. An image model is compared by its pictures, and
    what is found is what a worker goes by when it is to serve it coded.
    """
    wanted = {"--out": output, "--report": report, "--prompts": prompts, "--revision": revision}
    options = [f"{name}={value}" for name, value in wanted.items() if value is not None]
    found = _ask(["--quantization", quantization, f"--device={device}", *options, "--", path])
    if json:
        print_json(found)
        return
    is_image = found.get("kind") == "image"
    print_table(("", ""), _image_rows(found) if is_image else _rows(found))
    if not is_image and found["router"] is not None:
        out.print()
        print_table(("ROUTER", "CHOICES", "OTHER EXPERT"), _routers(found["router"]["layers"]))


def _ask(arguments: list[str]) -> dict[str, Any]:
    """The quantiser's report; what it refuses is a QuantizeFailed, and so is one that breaks."""
    with subprocess.Popen([*QUANTISER, *arguments], stdout=subprocess.PIPE, text=True) as child:
        try:
            said, _ = child.communicate()
        except KeyboardInterrupt:
            # It got the signal as well.
            with suppress(subprocess.TimeoutExpired):
                child.wait(CLEAN_UP_SECONDS)
            child.kill()
            raise
    try:
        answer = jsonlib.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        raise QuantizeFailed(f"the quantiser ended with status {child.returncode}; its words are above") from None
    if "error" in answer:
        raise QuantizeFailed(answer["error"]["message"])
    found: dict[str, Any] = answer["quality"]
    return found


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A report for a person."""
    divergence, greedy, weights = found["kl"], found["greedy"], found["weights"]
    before, after = weights["bytes_before"], weights["bytes_after"]
    yield "model", found["model"] + (f" @ {found['commit']}" if found["commit"] else "")
    yield "family", f"{found['family']} ({found['architecture']})"
    yield "compared", f"{found['quantization']} with {found['dtype']} on {found['device']}"
    yield "weights", f"{_in_units(after)} of {_in_units(before)} ({after / before:.0%})"
    yield "over", f"{found['positions']} positions of {found['prompts']} prompts"
    yield "KL", f"mean {divergence['mean']:.5f}, max {divergence['max']:.5f} nats"
    yield "best token", f"the same at {greedy['agreement']:.1%} of the positions"
    if greedy["same_before_difference"] is not None:
        yield (
            "greedy texts",
            f"{greedy['same_before_difference']:.1%} of {greedy['tokens_each']} tokens before they part",
        )
    if found["router"] is not None:
        yield "router", f"{found['router']['flip_rate']:.2%} of the choices fall on another expert"
    yield "seconds", f"{sum(found['seconds'].values()):.1f}"
    if found["artefact"]:
        yield "written", found["artefact"]
    yield "report", found["report"]


def _image_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report of an image model for a person."""
    ratio, error, weights = found["psnr"], found["latent_error"], found["weights"]
    before, after = weights["bytes_before"], weights["bytes_after"]
    yield "model", found["model"] + (f" @ {found['commit']}" if found["commit"] else "")
    yield "compared", f"{found['quantization']} with {found['dtype']} on {found['device']}"
    yield "transformer", f"{_in_units(after)} of {_in_units(before)} ({after / before:.0%})"
    side = f"{found['side']} x {found['side']}"
    yield "over", f"{found['pictures']} pictures of {side} in {found['steps']} steps"
    yield "PSNR", f"mean {ratio['mean']:.1f}, lowest {ratio['min']:.1f} dB"
    yield "latents", f"differ by {error['mean']:.2%}, at most by {error['max']:.2%}"
    served = "served" if ratio["mean"] >= found["min_psnr"] else "refused unless allow_low_psnr = true"
    yield "verdict", f"{served} (min_psnr is {found['min_psnr']:g} by default)"
    yield "seconds", f"{found['seconds']:.1f}"
    if found["kept"]:
        yield "kept for loads", found["kept"]
    yield "report", found["report"]


def _routers(layers: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for layer in layers:
        yield layer["layer"], str(layer["choices"]), f"{layer['flip_rate']:.2%}"


def _in_units(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size:.0f} {UNITS[unit]}"
