"""An image model's plan for a person: part of `inferfleet models plan`."""

from collections.abc import Iterator
from typing import Any

from inferfleet.workers.cli_output import in_numbers
from inferfleet.workers.loading import in_units


def image_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """found: what the engine's planner says."""
    yield "model", found["path"] + (f" @ {found['commit']}" if found["commit"] else "")
    yield "family", f"{found['family']} ({found['architecture']}), {'' if found['guided'] else 'not '}guided"
    yield "licence", _licence(found["licence"])
    coded = f" and {found['quantization']}" if found["quantization"] else ""
    numbers = sum(part["numbers"] for part in found["components"])
    yield "weights", f"{in_units(found['resident_bytes'])} in {found['dtype']}{coded}: {in_numbers(numbers)} in all"
    for part in found["components"]:
        yield part["name"], f"{in_units(part['resident_bytes'])}: {in_numbers(part['numbers'])}"
    yield "offloaded", f'{in_units(found["offloaded_bytes"])} with encoders = "offloaded"'
    yield "files", _files([part["stored"] for part in found["components"]])
    if memory := found["memory"]:
        left = max(0, memory["left_bytes"][memory["encoders"] or "resident"])
        how = ' with encoders = "offloaded"' if memory["encoders"] == "offloaded" else ""
        yield "GPU memory", f"{in_units(memory['gpu_bytes'])}, of which {in_units(left)} are left for pictures{how}"


def image_problem(found: dict[str, Any]) -> str | None:
    """Why the model cannot be served on such a GPU at all."""
    memory = found["memory"]
    if memory is None or memory["encoders"] is not None:
        return None
    needed, there = in_units(found["offloaded_bytes"]), in_units(memory["gpu_bytes"])
    return (
        f'the weights need {needed} even with encoders = "offloaded", more than the {there} there are;'
        " --quantization makes them smaller"
    )


def _licence(licence: dict[str, Any]) -> str:
    if not licence["needs_acceptance"]:
        return str(licence["tag"])
    return f"{licence['tag']}: to be read and accepted on {licence['url']}"


def _files(stored: list[dict[str, Any] | None]) -> str:
    complete = [files for files in stored if files is not None]
    if len(complete) < len(stored):
        return "there are no complete safetensors beside the configuration"
    formats = sorted({name for files in complete for name in files["numbers"]})
    size = sum(files["num_bytes"] for files in complete)
    return f"{in_units(size)} of safetensors ({', '.join(formats)})"
