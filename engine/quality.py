"""What quantising costs a model: `python -m inferfleet.engine.quality PATH --quantization KIND`, JSON on stdout.

The model is run over fixed prompts in its own precision and again with coded weights; with -o the coded weights are
written too. How weights are coded is not decided here. Image models are measured in diffusion/quantise.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from inferfleet.engine.config import ModelConfig, read_config
from inferfleet.engine.diffusion.components import is_pipeline
from inferfleet.engine.errors import EngineError, InvalidRequest, LoadError, OutOfMemory
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.offline import LLM
from inferfleet.engine.quality_prompts import read_prompts
from inferfleet.engine.quality_scores import LIKELIEST, Distance, Kept, compare, keep
from inferfleet.engine.quantized.artefact import check_target, slots_of, weight_bytes, write_artefact
from inferfleet.engine.quantized.scheme import read_scheme
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.text.chat import ChatTemplateError
from inferfleet.engine.text.tokenizer import TokenizerError
from inferfleet.engine.weights import commit_of, find_folder
from inferfleet.kernels.quantized import KINDS, Kind

REPORT = "quality_report.json"
#: Tokens compared of each prompt; how many prompts are continued, and by how many tokens.
PROMPT_TOKENS = 256
CONTINUED, CONTINUATION = 8, 64


@dataclass(frozen=True, kw_only=True)
class Task:
    """What was asked for."""

    path: str
    kind: Kind
    revision: str | None = None
    device: str = "auto"
    prompts: Path | None = None
    report: Path | None = None
    out: Path | None = None


class Watch:
    """Seconds of each part of the work; tells a person what begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._began, 3)
        self._began = now
        sys.stderr.write(f"{name.replace('_', ' ')}: {self.seconds[name]:.1f} s\n")


def quantise_and_report(task: Task) -> dict[str, Any]:
    """Does it all. Raises an EngineError; what can be refused is refused before anything is loaded."""
    prompts = read_prompts(task.prompts)
    if task.out is not None:
        check_target(task.out)
    folder = find_folder(task.path, task.revision)
    if is_pipeline(folder):
        return _image_report(task, folder, prompts)
    config = read_config(folder)
    scheme = read_scheme(config.raw)
    if scheme is not None:
        raise UnsupportedModel(f"{folder} is {scheme.name} already; what is quantised is a model in full precision")
    targets = report_files(task, folder)
    watch = Watch()
    report = _measured(task, folder, config, prompts, watch)

    def finish(partial: Path) -> None:
        watch.lap("write")
        write_report(report, partial / REPORT)

    if task.out is not None:
        report["artefact"] = str(task.out)
        write_artefact(folder, config, task.kind, task.out, finish)
    for path in targets:
        write_report(report, path)
    return report | {"report": str(task.out / REPORT if task.out is not None else targets[0])}


def _image_report(task: Task, folder: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """The same for a pipeline of components. Imported here: text models need no diffusers."""
    from inferfleet.engine.diffusion.quantise import refuse_artefact, report_on

    if task.out is not None:
        refuse_artefact(task.out)
    targets = report_files(task, folder)
    own = None if task.prompts is None else prompts
    report = report_on(task.path, task.kind, revision=task.revision, device=task.device, prompts=own)
    for path in targets:
        write_report(report, path)
    return report | {"report": str(targets[0])}


def report_files(task: Task, folder: Path) -> list[Path]:
    """Where the report goes beside a written model: the file asked for, or else the model's own folder."""
    path = task.report
    if path is None:
        if task.out is not None:
            return []
        path = folder / REPORT
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidRequest(f"{path} cannot be written; name another file with --report", param="report")
    return [path]


def write_report(report: dict[str, Any], path: Path) -> None:
    """InvalidRequest where it cannot be written after all."""
    try:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} could not be written: {error}", param="report") from error


def _measured(task: Task, folder: Path, config: ModelConfig, prompts: Sequence[str], watch: Watch) -> dict[str, Any]:
    llm = _load(task, folder, config, None)
    watch.lap("load")
    room = llm.card["max_model_len"]
    encode = llm.engine.tokenizer.encode
    ids = [encode(text, add_special_tokens=True)[: min(PROMPT_TOKENS, room)] for text in prompts]
    ids = [tokens for tokens in ids if tokens]
    full, texts = keep(llm, ids), _continued(llm, ids)
    card = llm.card
    watch.lap("score")
    del llm
    _free()
    llm = _load(task, folder, config, task.kind)
    watch.lap("load_quantised")
    distances, ours = compare(llm, ids, full), _continued(llm, ids)
    watch.lap("score_quantised")
    del llm
    _free()
    dtype = getattr(torch, card["dtype"])
    slots = slots_of(config, task.kind)
    return {
        "model": task.path,
        "commit": commit_of(folder),
        "family": card["family"],
        "architecture": card["architecture"],
        "quantization": task.kind,
        "dtype": card["dtype"],
        "device": card["device"],
        "prompts": len(ids),
        "positions": sum(map(len, ids)),
        "kl": _divergence(distances, full),
        "greedy": _greedy(distances, texts, ours),
        "router": _router(distances),
        "weights": {
            "bytes_before": weight_bytes(slots, dtype, None),
            "bytes_after": weight_bytes(slots, dtype, task.kind),
        },
        "seconds": watch.seconds,
        "artefact": None,
    }


def _load(task: Task, folder: Path, config: ModelConfig, kind: Kind | None) -> LLM:
    return LLM(
        str(folder),
        device=task.device,
        quantization=kind,
        max_model_len=min(PROMPT_TOKENS + CONTINUATION, config.max_positions),
        max_num_seqs=CONTINUED,
        prefix_caching=False,
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _continued(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy texts after prompts from all over the set; the end of a text does not end them."""
    step = max(1, len(prompts) // CONTINUED)
    some = list(prompts[::step])[:CONTINUED]
    room = llm.card["max_model_len"] - CONTINUATION
    given = [{"prompt_token_ids": list(ids[:room])} for ids in some if room > 0]
    greedy = SamplingParams(temperature=0.0, max_tokens=CONTINUATION, ignore_eos=True)
    return [answer.outputs[0].token_ids for answer in llm.generate(given, greedy)]


def _divergence(distances: Sequence[Distance], full: Sequence[Kept]) -> dict[str, Any]:
    whole = torch.cat([distance.divergence for distance in distances])
    rest = torch.cat([kept.rest for kept in full])
    return {
        "mean": float(whole.mean()),
        "max": float(whole.max()),
        "unit": "nats",
        "likeliest": LIKELIEST,
        "mean_mass_of_rest": float(rest.exp().mean()),
    }


def _greedy(distances: Sequence[Distance], full: Sequence[list[int]], ours: Sequence[list[int]]) -> dict[str, Any]:
    agrees = torch.cat([distance.agrees for distance in distances]).double()
    same = [_same(one, other) for one, other in zip(full, ours, strict=True)]
    tokens = sum(map(len, full))
    return {
        "agreement": float(agrees.mean()),
        "continuations": len(full),
        "tokens_each": CONTINUATION,
        "same_before_difference": sum(same) / tokens if tokens else None,
    }


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that are equal before the first that is not."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _router(distances: Sequence[Distance]) -> dict[str, Any] | None:
    """None for a model without routers."""
    layers: list[dict[str, Any]] = []
    all_choices, all_flips = 0, 0
    for layer in distances[0].flips:
        choices = sum(distance.flips[layer][0] for distance in distances)
        flips = sum(distance.flips[layer][1] for distance in distances)
        layers.append({"layer": layer, "choices": choices, "flips": flips, "flip_rate": flips / choices})
        all_choices, all_flips = all_choices + choices, all_flips + flips
    return {"flip_rate": all_flips / all_choices, "layers": layers} if layers else None


def _stop(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # what is half written is removed on the way out


def main() -> int:
    """Prints {"quality": {...}} or {"error": {"code", "message"}}; exit status 1 with an error."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.engine.quality", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--quantization", dest="kind", choices=KINDS, required=True)
    parser.add_argument("--revision")
    parser.add_argument("--device", default="auto")
    for name in ("--prompts", "--report"):
        parser.add_argument(name, type=lambda text: Path(text).expanduser())
    parser.add_argument("-o", "--out", type=lambda text: Path(text).expanduser().absolute())
    signal.signal(signal.SIGTERM, _stop)
    try:
        answer = {"quality": quantise_and_report(Task(**vars(parser.parse_args())))}
    except EngineError as error:
        answer = {"error": {"code": error.code, "message": str(error)}}
    except (TokenizerError, ChatTemplateError) as error:
        answer = {"error": {"code": LoadError.code, "message": str(error)}}
    except torch.OutOfMemoryError as error:
        answer = {"error": {"code": OutOfMemory.code, "message": str(error)}}
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    sys.stdout.write(json.dumps(answer) + "\n")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
