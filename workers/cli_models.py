"""`inferfleet models`: what the fleet serves; `inferfleet models plan`: what a model would need to be served."""

import json as jsonlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from inferfleet.tasks.errors import SetupError
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client
from inferfleet.workers.cli_output import EXIT_ERROR, err, print_json, print_table
from inferfleet.workers.loading import Loading, in_units

app = typer.Typer(help="List the models that the fleet serves, or plan one.", invoke_without_command=True)

#: Weights and shapes are the engine's business, and so is torch: the planner is a process of its own.
PLANNER = (sys.executable, "-m", "inferfleet.engine.plan")
#: Reading the headers of many files from the hub takes a while, but not for ever.
PLAN_SECONDS = 600.0
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


class PlanFailed(SetupError):
    """The model cannot be planned."""

    code = "plan_failed"


@app.callback()
def models(context: typer.Context, json: Json = False, api_url: ApiUrl = None, api_key: ApiKey = None) -> None:
    """List the models that the fleet serves, or plan one."""
    if context.invoked_subcommand is not None:
        return
    with api_client(api_url, api_key) as client:
        listed = client.request("GET", "/v1/models")
    if json:
        print_json(listed)
        return
    rows = [
        (card["id"], _status(card), str(card.get("family", "-")), str(card.get("max_model_len") or "-"))
        for card in listed["data"]
    ]
    print_table(("MODEL", "STATUS", "FAMILY", "CONTEXT"), rows)


@app.command()
def plan(
    path: Annotated[str, typer.Argument(help="A model's folder, or a hub id: no weights are fetched.")],
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="What a GPU has, as 80GiB or 24e9 bytes as 24GB.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Tokens of prompt and answer together.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), bfloat16 or float32.")] = "auto",
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit of the hub id.")] = None,
    json: Json = False,
) -> None:
    """What a model's weights and contexts take, how long a context fits and how many of them; before it is served.

    With --max-model-len the exit status says whether one such context fits.
    """
    wanted = {
        "--gpu-memory": None if gpu_memory is None else str(parse_size(gpu_memory)),
        "--max-model-len": None if max_model_len is None else str(max_model_len),
        "--revision": revision,
    }
    options = [part for name, value in wanted.items() if value is not None for part in (name, value)]
    found = _ask_planner(["--dtype", dtype, *options, "--", path])
    if json:
        print_json(found)
    else:
        print_table(("", ""), _rows(found))
    problems = list(_problems(found, max_model_len))
    for problem in problems:
        err.print(problem, markup=False)
    if problems:
        raise typer.Exit(EXIT_ERROR)


def parse_size(text: str) -> int:
    """Bytes: `80GiB` and `80G` are binary, `80GB` is decimal, a bare number is bytes."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 80GiB", param_hint="--gpu-memory")
    number, unit, binary = found.groups()
    is_decimal = text.strip()[-1] in "bB" and not binary
    return int(float(number) * (1000 if is_decimal else 1024) ** " kmgt".index(unit.lower() or " "))


def _ask_planner(arguments: list[str]) -> dict[str, Any]:
    """The planner's answer; what it refuses is a PlanFailed, and so is a planner that breaks."""
    try:
        done = subprocess.run(
            [*PLANNER, *arguments], stdout=subprocess.PIPE, text=True, timeout=PLAN_SECONDS, check=False
        )
        answer = jsonlib.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise PlanFailed(f"the hub did not answer within {PLAN_SECONDS:.0f} s") from None
    except (IndexError, ValueError):
        raise PlanFailed(f"the planner ended with status {done.returncode}; its words are above") from None
    if "error" in answer:
        raise PlanFailed(answer["error"]["message"])
    found: dict[str, Any] = answer["plan"]
    return found


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A plan for a person."""
    weights, cache = found["weights"], found["cache"]
    yield "model", found["path"] + (f" @ {found['commit']}" if found["commit"] else "")
    yield "family", f"{found['family']} ({found['architecture']})"
    yield (
        "weights",
        (f"{in_units(weights['resident_bytes'])} in {found['dtype']}: {weights['numbers'] / 1e9:.2f} billion numbers"),
    )
    if stored := weights["stored"]:
        formats = ", ".join(sorted(stored["numbers"]))
        yield "files", f"{in_units(stored['num_bytes'])} of safetensors ({formats})"
    else:
        yield "files", "there are none beside the configuration"
    for layer in cache["layers"]:
        yield f"{layer['layers']} layers", _costs(layer)
    yield "a token", f"{in_units(cache['bytes_per_token'])} of cache beyond every window and chunk"
    for context in found["contexts"]:
        yield f"{context['tokens']} tokens", _context(context)
    if memory := found.get("memory"):
        yield "GPU memory", f"{in_units(memory['gpu_bytes'])}, of which {in_units(memory['cache_bytes'])} for the cache"
        yield "longest", f"{memory['longest_context']} tokens of the model's {found['max_positions']} in one sequence"


def _costs(layer: dict[str, Any]) -> str:
    if "bytes_per_sequence" in layer:
        return f"{layer['kind']}: {in_units(layer['bytes_per_sequence'])} a sequence"
    span = f", for the last {layer['span']} tokens" if layer["span"] else ""
    return f"{layer['kind']}: {in_units(layer['bytes_per_token'])} a token{span}"


def _context(context: dict[str, Any]) -> str:
    needs = f"{in_units(context['cache_bytes'])} of cache; one needs a GPU of {in_units(context['gpu_bytes'])}"
    return needs if context["sequences"] is None else f"{needs}; {context['sequences']} fit"


def _problems(found: dict[str, Any], max_model_len: int | None) -> Iterator[str]:
    """Why the context that was asked for cannot be served."""
    asked = next((c for c in found["contexts"] if c["tokens"] == max_model_len), None)
    if asked is None:
        return
    if not asked["within_positions"]:
        yield f"max_model_len {max_model_len} is more than the {found['max_positions']} positions of this model"
    if asked["sequences"] == 0:
        memory = found["memory"]
        yield (
            f"a context of {max_model_len} tokens needs {in_units(asked['cache_bytes'])} of cache, but"
            f" {in_units(memory['cache_bytes'])} are left beside the weights: the longest that fits is"
            f" {memory['longest_context']}; a GPU of {in_units(asked['gpu_bytes'])} would hold it"
        )


def _status(card: dict[str, Any]) -> str:
    """With how far it is, while it loads."""
    loading = card.get("loading")
    return f"{card['status']}: {Loading.of(loading)}" if loading else str(card["status"])
