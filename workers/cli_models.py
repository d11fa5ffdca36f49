"""`inferfleet models`: what the fleet serves; `inferfleet models plan`: what a model would need to be served."""

import json as jsonlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import typer

from inferfleet.tasks.errors import SetupError
from inferfleet.workers.cli_image_plan import image_problem, image_rows
from inferfleet.workers.cli_options import ApiKey, ApiUrl, Json, api_client
from inferfleet.workers.cli_output import EXIT_ERROR, err, in_numbers, print_facts, print_json, print_table
from inferfleet.workers.loading import Loading, in_units

app = typer.Typer(help="List the models that the fleet serves, or plan one.", invoke_without_command=True)

#: Weights and shapes are the engine's business, and so is torch: the planner is a process of its own.
PLANNER = (sys.executable, "-m", "inferfleet.engine.plan")
#: Reading the headers of many files from the hub takes a while, but not for ever.
PLAN_SECONDS = 600.0
#: No memory has more digits than these, and a float can hold them.
SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE | re.ASCII)


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
        (
            card["id"],
            _status(card),
            str(card.get("family", "-")),
            str(card.get("max_model_len") or "-"),
            str(card.get("kind") or "-"),
        )
        for card in listed["data"]
    ]
    print_table(("MODEL", "STATUS", "FAMILY", "CONTEXT", "KIND"), rows)


@app.command()
def plan(
    path: Annotated[str, typer.Argument(help="A model's folder, or a hub id: no weights are fetched.")],
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="What each GPU has: 80GiB, or 24GB for 24e9 bytes."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Tokens of prompt and answer together.")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, help="Sequences at once, each with its windows, chunks and states.")
    ] = 1,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", min=1, help="GPUs that hold the model together.")
    ] = 1,
    quantization: Annotated[
        Literal["int8", "int4", "fp8"] | None, typer.Option("--quantization", help="What plain weights become.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), bfloat16 or float32.")] = "auto",
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit of the hub id.")] = None,
    json: Json = False,
) -> None:
    """What a model's weights and contexts take, how long a context fits and how many of them; before it is served.

    With --gpu-memory the exit status says whether it can be served, with --max-model-len a context of that length.
    Of an image model it is the weights of its parts, and what they leave for pictures.
    """
    wanted = {
        "--gpu-memory": None if gpu_memory is None else str(parse_size(gpu_memory)),
        "--max-model-len": None if max_model_len is None else str(max_model_len),
        "--max-num-seqs": str(max_num_seqs),
        "--tensor-parallel-size": str(tensor_parallel_size),
        "--dtype": dtype,
        "--quantization": quantization,
        "--revision": revision,
    }
    found = _ask_planner([*(f"{name}={value}" for name, value in wanted.items() if value is not None), "--", path])
    if json:
        print_json(found)
    else:
        print_facts(image_rows(found) if found["kind"] == "image" else _rows(found))
    if problem := image_problem(found) if found["kind"] == "image" else _problem(found, max_model_len):
        err.print(problem, markup=False)
        raise typer.Exit(EXIT_ERROR)


def parse_size(text: str) -> int:
    """Bytes: `80GiB` and `80G` are binary, `80GB` is decimal, a bare number is bytes."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 80GiB", param_hint="--gpu-memory")
    number, unit, binary = found.groups()
    is_decimal = text.strip()[-1] in "bB" and not binary
    size = int(float(number) * (1000 if is_decimal else 1024) ** " kmgt".index((unit or " ").lower()))
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no memory at all", param_hint="--gpu-memory")
    return size


def _ask_planner(arguments: list[str]) -> dict[str, Any]:
    """The planner's answer; what it refuses is a PlanFailed, and so is a planner that breaks."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError("the planner computes with torch", name="torch")
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
    weights, cache, gpus = found["weights"], found["cache"], found["tensor_parallel_size"]
    yield "model", found["path"] + (f" @ {found['commit']}" if found["commit"] else "")
    yield "family", f"{found['family']} ({found['architecture']})"
    if gpus > 1:
        yield "GPUs", f"{gpus}; all that follows but the files is what each of them holds"
    coded = f" and {found['quantization']}" if found["quantization"] else ""
    size = f"{in_units(weights['resident_bytes'])} in {found['dtype']}{coded}"
    yield "weights", f"{size}: {in_numbers(weights['numbers'])} in all"
    if stored := weights["stored"]:
        formats = ", ".join(sorted(stored["numbers"]))
        yield "files", f"{in_units(stored['num_bytes'])} of safetensors ({formats})"
    else:
        yield "files", "there are no complete safetensors beside the configuration"
    for layer in cache["layers"]:
        yield f"{layer['layers']} layers", _costs(layer)
    yield "a token", f"{in_units(cache['bytes_per_token'])} of cache beyond every window and chunk"
    for context in found["contexts"]:
        yield f"{context['tokens']} tokens", _context(context, found["max_num_seqs"], gpus)
    if memory := found.get("memory"):
        yield "GPU memory", f"{in_units(memory['gpu_bytes'])}, of which {in_units(memory['cache_bytes'])} for the cache"
        yield "longest", f"{memory['longest_context']} of {found['max_positions']} tokens{_seats(found)}"


def _seats(found: dict[str, Any]) -> str:
    """For how many sequences at once the longest context is meant, and what a worker makes of it untold."""
    told, usual = found["max_num_seqs"], found["memory"]["usual"]
    if told == usual["max_num_seqs"]:
        return f" with max_num_seqs {told}"
    return f" with max_num_seqs {told}; {usual['longest_context']} with a worker's usual {usual['max_num_seqs']}"


def _gpus(count: int) -> str:
    return "a GPU" if count == 1 else f"{count} GPUs"


def _costs(layer: dict[str, Any]) -> str:
    if "bytes_per_sequence" in layer:
        return f"{layer['kind']}: {in_units(layer['bytes_per_sequence'])} a sequence"
    span = f", for the last {layer['span']} tokens" if layer["span"] else ""
    return f"{layer['kind']}: {in_units(layer['bytes_per_token'])} a token{span}"


def _context(context: dict[str, Any], max_num_seqs: int, ranks: int) -> str:
    seats = f" with room for {max_num_seqs} sequences" if max_num_seqs > 1 else ""
    needs = f"{in_units(context['cache_bytes'])} of cache{seats}, on {_gpus(ranks)} of {in_units(context['gpu_bytes'])}"
    return needs if context["sequences"] is None else f"{needs}; {context['sequences']} fit at once"


def _problem(found: dict[str, Any], max_model_len: int | None) -> str | None:
    """Why the context that was asked for, or any at all, cannot be served."""
    context = next((c for c in found["contexts"] if c["tokens"] == max_model_len), found["contexts"][0])
    if not context["within_positions"]:
        return f"max_model_len {max_model_len} is more than the {found['max_positions']} positions of this model"
    memory = found.get("memory")
    # A model's own context is cut to what fits; only one that was asked for is refused.
    if memory is None or context["fits"] or (max_model_len is None and memory["longest_context"]):
        return None
    weights = found["weights"]["resident_bytes"]
    if weights > memory["gpu_bytes"]:
        why = f"the weights alone need {in_units(weights)}, more than the {in_units(memory['gpu_bytes'])} there are"
    else:
        why = f"{in_units(memory['cache_bytes'])} are left for it beside {in_units(weights)} of weights"
    return (
        f"a context of {context['tokens']} tokens needs {in_units(context['cache_bytes'])} of cache, but {why};"
        f" the longest that fits is {memory['longest_context']}, and"
        f" {_gpus(found['tensor_parallel_size'])} of {in_units(context['gpu_bytes'])} would hold it"
    )


def _status(card: dict[str, Any]) -> str:
    """With how far it is, while it loads."""
    loading = card.get("loading")
    return f"{card['status']}: {Loading.of(loading)}" if loading else str(card["status"])
