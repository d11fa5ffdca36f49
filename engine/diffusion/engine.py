"""The diffusion engine: requests for pictures in, news out, one bounded unit of work a step. Knows no jobs, no queue.

Pictures of one size share the steps of the transformer, each at its own noise level, with its own prompt, guidance and
number of steps; a new one joins at the next step. Which, and in what order: turns.py. A file is written beside the
next steps by a thread, as compressing it takes no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from inferfleet.engine.diffusion.canvas import Canvas, begin, move
from inferfleet.engine.diffusion.decoder import Decoder
from inferfleet.engine.diffusion.licence import repository_of
from inferfleet.engine.diffusion.limits import Limits, Wanted
from inferfleet.engine.diffusion.output import ImageStepOutput, ImageUsage, Picture, Preview, Progress
from inferfleet.engine.diffusion.params import ImageParams
from inferfleet.engine.diffusion.pictures import CONTENT_TYPES, facts, read_init_image, to_file
from inferfleet.engine.diffusion.pipeline import Pipeline
from inferfleet.engine.diffusion.previews import CONTENT_TYPE as PREVIEW_TYPE
from inferfleet.engine.diffusion.previews import preview
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.diffusion.turns import Group, Move, Paint, Prepare, Row, Turns
from inferfleet.engine.errors import EngineError, InvalidRequest, NumericalError
from inferfleet.engine.failures import explain, is_out_of_memory

T = TypeVar("T")

NOT_FINITE = "the picture's latents are not finite"


@dataclass(slots=True, eq=False)
class _Request:
    """One prompt with its n pictures."""

    id: str
    wanted: Wanted
    #: Tokens of the prompt.
    num_tokens: int
    rows: list[Row]
    #: uint8 [H, W, 3], until it is encoded.
    init_image: Tensor | None
    canvases: dict[Row, Canvas] = field(default_factory=dict)
    #: Files that are being written, by index.
    files: dict[int, Future[bytes]] = field(default_factory=dict)
    num_finished: int = 0

    @property
    def usage(self) -> ImageUsage:
        group = self.rows[0].group
        return ImageUsage(self.num_tokens, self.num_finished * (group.height * group.width // 4))

    @property
    def progress(self) -> Progress:
        done = sum(row.num_done for row in self.rows)
        return Progress(self.id, done, sum(row.num_steps for row in self.rows))


class DiffusionEngine:
    """`add` and `cancel` between the steps of one thread; `step` computes one unit and returns the news."""

    def __init__(self, pipeline: Pipeline, spec: DiffusionSpec) -> None:
        """LoadError for settings that the pipeline does not allow."""
        self.pipeline = pipeline
        self.limits = Limits.of(
            guided=pipeline.guided,
            max_sequence_length=pipeline.max_sequence_length,
            default_size=pipeline.default_size,
            max_pixels=spec.max_pixels,
            vae_scale=pipeline.vae_scale,
            lora_names=pipeline.loras.names,
        )
        self.decoder = Decoder(pipeline.vae, vae_scale=pipeline.vae_scale, tiling_pixels=spec.vae_tiling_pixels)
        self.turns = Turns(spec.max_batch_size)
        self.num_steps = 0
        #: Told the latents [1, C, h, w] of each picture before it is painted: (request id, index, latents).
        self.on_latents: Callable[[str, int, Tensor], None] | None = None
        self._model = repository_of(pipeline.folder) or pipeline.folder.name
        self._open: dict[str, _Request] = {}
        self._num_added = self._num_split = 0
        self._news = ImageStepOutput()
        self._writer = ThreadPoolExecutor(1, "pictures")

    @property
    def has_work(self) -> bool:
        """True if `step` would compute, wait for or tell something."""
        return bool(self._open or self._news)

    def add(self, request_id: str, params: ImageParams, *, priority: int = 0) -> None:
        """Take a request. InvalidRequest names the field that is outside its limits."""
        if request_id in self._open:
            raise InvalidRequest(f"a request with the id {request_id} is running", param="id")
        wanted = self.limits.settle(params)
        num_tokens = self.pipeline.prompts.count(wanted.prompt)
        if num_tokens > wanted.max_sequence_length:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens, more than max_sequence_length {wanted.max_sequence_length}",
                param="prompt",
            )
        init = params.init_image
        pixels = None if init is None else read_init_image(init, wanted.width, wanted.height)
        scale = self.pipeline.vae_scale
        group = Group(wanted.height // scale, wanted.width // scale, wanted.max_sequence_length)
        rows = [Row(request_id, index, group, wanted.num_steps, priority, self._num_added) for index in range(wanted.n)]
        self._num_added += 1
        self._open[request_id] = _Request(request_id, wanted, num_tokens, rows, pixels)
        self.turns.add(rows)

    def cancel(self, request_id: str) -> bool:
        """End an id at once, its memory with it; the next step tells its usage. False if no such id is open."""
        request = self._open.get(request_id)
        if request is None:
            return False
        self._news.finished.append((request_id, request.usage))
        self._forget(request_id)
        return True

    def step(self) -> ImageStepOutput:
        """One unit of work. What fails in it fails the requests that cannot do without it, and no others."""
        out, self._news = self._news, ImageStepOutput()
        unit = self.turns.next()
        if unit is not None:
            self.num_steps += 1
        if isinstance(unit, Prepare):
            self._prepare(self._open[unit.id], out)
        elif isinstance(unit, Move):
            self._move([self._open[row.id].canvases[row] for row in unit.rows], out)
        elif isinstance(unit, Paint):
            self._paint(unit.row, out)
        self._tell_files(out, wait=unit is None and not out)
        return out

    def stats(self) -> dict[str, Any]:
        """What is going on now, and counts since the start."""
        return {
            "running": self.turns.num_seated,
            "waiting": self.turns.num_waiting,
            "sizes": self.turns.num_groups,
            "vae_retries": self.decoder.num_retries,
            "batches_split": self._num_split,
            "lora_bytes": self.pipeline.loras.num_bytes,
            **self.pipeline.prompts.stats(),
        }

    def _prepare(self, request: _Request, out: ImageStepOutput) -> None:
        """Everything that a request's pictures need before their first step."""
        wanted = request.wanted
        try:
            embeddings = self._with_room(lambda: self.pipeline.prompts.embed(wanted.prompt, wanted.max_sequence_length))
            init = request.init_image
            moments = None if init is None else self._with_room(lambda: self.decoder.encode(init))
            for row in request.rows:
                canvas = begin(row, wanted, embeddings, moments, self.pipeline, self.decoder)
                request.canvases[row] = canvas
        except Exception as error:
            self._fail([request.id], explain(error, self.pipeline.device), out)
            return
        request.init_image = None
        self.turns.prepared(request.id)

    def _move(self, canvases: Sequence[Canvas], out: ImageStepOutput) -> None:
        out.batch_size = len(canvases)
        group = canvases[0].row.group
        moved, broken, failed = self._try(canvases)
        self.turns.moved(group, [canvas.row for canvas in moved])
        for request_id, error in failed.items():
            self._fail([request_id], error, out)
        self._fail({canvas.row.id for canvas in broken}, NumericalError(NOT_FINITE), out)
        for request_id in dict.fromkeys(canvas.row.id for canvas in moved):
            if request_id in self._open:
                out.deltas.append(self._open[request_id].progress)
        for canvas in moved:
            if canvas.guess is not None and canvas.row.id in self._open:
                self._preview(canvas, canvas.guess, out)

    def _try(self, canvases: Sequence[Canvas]) -> tuple[list[Canvas], list[Canvas], dict[str, EngineError]]:
        """One step: pictures that took it, those that came out broken, and errors by request id.

        A batch that fails is halved until each picture that fails does so alone: no picture fails for its mates.
        """
        try:
            finite = move(canvases, self.pipeline)
        except Exception as error:
            reason = explain(error, self.pipeline.device)
            if len(canvases) == 1:
                return [], [], {canvases[0].row.id: reason}
            half = (len(canvases) + 1) // 2
            if is_out_of_memory(error):
                self.turns.shrink(canvases[0].row.group, half)
        else:
            moved = [canvas for canvas, good in zip(canvases, finite, strict=True) if good]
            return moved, [canvas for canvas in canvases if canvas not in moved], {}
        # Outside of the handler: the error there holds the failed step's tensors through its traceback.
        self._num_split += 1
        self._empty_cache()
        first, second = self._try(canvases[:half]), self._try(canvases[half:])
        return first[0] + second[0], first[1] + second[1], first[2] | second[2]

    def _preview(self, canvas: Canvas, guessed: Tensor, out: ImageStepOutput) -> None:
        canvas.guess = None
        row = canvas.row
        try:
            data = preview(canvas.grid(guessed), self.decoder)
        except Exception as error:  # the picture itself can do without
            explain(error, self.pipeline.device)
            return
        if data is not None:
            out.deltas.append(Preview(row.id, row.index, row.num_done, PREVIEW_TYPE, data))

    def _paint(self, row: Row, out: ImageStepOutput) -> None:
        request = self._open[row.id]
        canvas = request.canvases.pop(row)
        self.turns.painted(row)
        latents = canvas.grid(canvas.latents)
        if self.on_latents is not None:
            self.on_latents(row.id, row.index, latents)
        try:
            pixels = self._with_room(lambda: self.decoder.paint(latents))
        except Exception as error:
            self._fail([row.id], explain(error, self.pipeline.device), out)
            return
        wanted = request.wanted
        licence = self.pipeline.licence.tag
        about = facts(wanted, row.index, model=self._model, commit=self.pipeline.commit, licence=licence)
        request.files[row.index] = self._writer.submit(
            to_file, pixels, wanted.output_format, wanted.output_compression, about
        )

    def _tell_files(self, out: ImageStepOutput, *, wait: bool) -> None:
        """Files that are written by now; with `wait` and nothing else to do, at least one."""
        for request in list(self._open.values()):
            for index, file in list(request.files.items()):
                if not (file.done() or wait):
                    continue
                wait = False
                del request.files[index]
                try:
                    data = file.result()
                except Exception as error:
                    self._fail([request.id], explain(error, self.pipeline.device), out)
                    break
                self._finish(request, index, data, out)

    def _finish(self, request: _Request, index: int, data: bytes, out: ImageStepOutput) -> None:
        wanted = request.wanted
        content_type = CONTENT_TYPES[wanted.output_format]
        size = (wanted.width, wanted.height)
        out.deltas.append(Picture(request.id, index, wanted.seed + index, *size, content_type, data))
        request.num_finished += 1
        if request.num_finished == wanted.n:
            out.finished.append((request.id, request.usage))
            self._forget(request.id)

    def _fail(self, ids: Iterable[str], error: EngineError, out: ImageStepOutput) -> None:
        for request_id in ids:
            if request_id in self._open:
                self._forget(request_id)
                out.errors.append((request_id, error))

    def _forget(self, request_id: str) -> None:
        self.turns.drop(request_id)
        for file in self._open.pop(request_id).files.values():
            file.cancel()

    def _with_room(self, work: Callable[[], T]) -> T:
        """The work; where memory runs out, once more after the allocator gave back what it keeps for other sizes."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._empty_cache()
        return work()

    def _empty_cache(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
