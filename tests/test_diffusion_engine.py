"""The diffusion engine on small random pipelines: batches of different pictures, cancels, faults of one picture."""

from __future__ import annotations

import gc
import io
import random
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_pipeline import write

from inferfleet.engine.diffusion import canvas as canvas_module
from inferfleet.engine.diffusion import engine as engine_module
from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.output import ImageUsage, Picture, Preview, Progress
from inferfleet.engine.diffusion.params import ImageParams
from inferfleet.engine.diffusion.pipeline import Pipeline, load_pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import EngineError, InvalidRequest, NumericalError, OutOfMemory
from inferfleet.engine.progress import Progress as Loading


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is computed here is too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["schnell", "dev"])
def loaded(request, tmp_path_factory) -> tuple[Pipeline, DiffusionSpec]:
    return load(tmp_path_factory.mktemp(request.param), seed=0 if request.param == "schnell" else 1)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory) -> tuple[Pipeline, DiffusionSpec]:
    return load(tmp_path_factory.mktemp("schnell"), seed=0)


def load(folder, seed: int) -> tuple[Pipeline, DiffusionSpec]:
    write(folder, seed)
    licence = "flux-1-dev-non-commercial-license"
    spec = DiffusionSpec(path=str(folder), dtype="float32", device="cpu", accept_licence=licence, max_batch_size=4)
    return load_pipeline(spec, Loading()), spec


class Told:
    """All that an engine says, by request, and the latents of each picture before it is painted."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self.pictures: dict[tuple[str, int], Picture] = {}
        self.previews: list[Preview] = []
        self.progress: dict[str, list[tuple[int, int]]] = {}
        self.finished: dict[str, ImageUsage] = {}
        self.errors: dict[str, EngineError] = {}
        self.batches: list[int] = []
        self.latents: dict[tuple[str, int], torch.Tensor] = {}
        engine.on_latents = lambda name, index, value: self.latents.update({(name, index): value.clone()})

    def step(self) -> None:
        out = self.engine.step()
        self.batches.append(out.batch_size)
        for delta in out.deltas:
            match delta:
                case Picture():
                    assert (delta.id, delta.index) not in self.pictures
                    self.pictures[delta.id, delta.index] = delta
                case Preview():
                    self.previews.append(delta)
                case Progress():
                    self.progress.setdefault(delta.id, []).append((delta.step, delta.steps))
        for name, usage in out.finished:
            assert name not in self.finished and name not in self.errors
            self.finished[name] = usage
        for name, error in out.errors:
            assert name not in self.finished and name not in self.errors
            self.errors[name] = error

    def run(self) -> Told:
        while self.engine.has_work:
            self.step()
        return self


def params(prompt: str = "a red circle", **changes) -> ImageParams:
    usual = {"seed": 1, "width": 48, "height": 48, "num_inference_steps": 2, "max_sequence_length": 16}
    return ImageParams(prompt=prompt, **usual | changes)


def alone(loaded, request: ImageParams) -> Told:
    told = Told(DiffusionEngine(*loaded))
    told.engine.add("alone", request)
    return told.run()


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def mixed(count: int, choice: random.Random, *, guided: bool) -> list[ImageParams]:
    """Requests of all kinds."""
    found = []
    for number in range(count):
        width, height = choice.choice([(48, 48), (48, 48), (64, 32), (16, 80)])
        changes = {
            "seed": choice.randrange(1000),
            "width": width,
            "height": height,
            "n": choice.choice([1, 1, 1, 2, 3]),
            "num_inference_steps": choice.randint(1, 4),
            "max_sequence_length": choice.choice([16, 16, 24]),
            "preview_every": choice.choice([None, None, 1, 2]),
        }
        if guided:
            changes["guidance_scale"] = choice.choice([0.0, 1.0, 3.5, 30.0])
        if choice.random() < 0.25:
            changes |= {"init_image": png(width, height, number), "strength": choice.choice([0.2, 0.6, 1.0])}
        found.append(params(choice.choice(["a red circle", "a blue square", f"number {number}"]), **changes))
    return found


def test_a_request_tells_its_progress_its_pictures_and_its_end(schnell):
    told = alone(schnell, params(n=2, num_inference_steps=3))
    assert told.progress == {"alone": [(2, 6), (4, 6), (6, 6)]}
    assert sorted(told.pictures) == [("alone", 0), ("alone", 1)]
    first, second = told.pictures["alone", 0], told.pictures["alone", 1]
    assert (first.seed, second.seed, first.width, first.height, first.content_type) == (1, 2, 48, 48, "image/png")
    assert Image.open(io.BytesIO(first.data)).size == (48, 48)
    assert first.data != second.data
    # 48 x 48 pixels are 3 x 3 tokens of latents; "a red circle" and the end are four of T5.
    assert told.finished == {"alone": ImageUsage(4, 18)}
    assert not told.errors


def test_pictures_at_different_steps_share_the_transformer(schnell):
    # Given a picture of four steps that has taken one,
    told = Told(DiffusionEngine(*schnell))
    told.engine.add("long", params(num_inference_steps=4))
    while "long" not in told.progress:
        told.step()
    # when another one of that size comes, then both move in one batch.
    told.engine.add("short", params("a blue square", seed=9, num_inference_steps=2))
    told.run()
    assert [size for size in told.batches if size] == [1, 2, 2, 1]
    assert sorted(told.pictures) == [("long", 0), ("short", 0)]


def test_no_picture_depends_on_those_beside_it(loaded):
    # Given requests of all kinds, which come while others are painted, some cancelled on the way,
    choice = random.Random(3)
    requests = mixed(10, choice, guided=loaded[0].guided)
    soak(loaded, requests, choice)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_long_soak_of_random_requests(loaded, seed):
    choice = random.Random(seed)
    soak(loaded, mixed(40, choice, guided=loaded[0].guided), choice)


def soak(loaded, requests: list[ImageParams], choice: random.Random) -> None:
    told = Told(DiffusionEngine(*loaded))
    cancelled = set()
    for number, request in enumerate(requests):
        told.engine.add(f"r{number}", request, priority=choice.choice([-1, 0, 0, 3]))
        for _ in range(choice.randint(0, 6)):
            told.step()
        if choice.random() < 0.15 and told.engine.cancel(victim := f"r{choice.randint(0, number)}"):
            cancelled.add(victim)
    told.run()
    # then each is what it is alone, to the bit, and whatever was cancelled has ended too.
    assert not told.errors
    assert set(told.finished) == {f"r{number}" for number in range(len(requests))}
    assert max(told.batches) > 1
    for number, request in enumerate(requests):
        single = alone(loaded, request)
        for index in range(request.n):
            if f"r{number}" in cancelled:
                continue
            assert torch.equal(told.latents[f"r{number}", index], single.latents["alone", index])
            assert told.pictures[f"r{number}", index].data == single.pictures["alone", index].data
        if f"r{number}" not in cancelled:
            assert told.finished[f"r{number}"] == single.finished["alone"]


def test_a_cancelled_request_frees_its_memory_at_once_and_tells_its_usage(schnell):
    # Given two requests on their way, one with a picture that is done,
    told = Told(DiffusionEngine(*schnell))
    told.engine.add("gone", params(n=2, num_inference_steps=4, init_image=png(48, 48), strength=1.0))
    told.engine.add("stays", params(num_inference_steps=4))
    while len(told.progress.get("gone", ())) < 2:
        told.step()
    request = told.engine._open["gone"]
    held = [weakref.ref(canvas.latents) for canvas in request.canvases.values()]
    assert len(held) == 2
    del request
    gc.disable()
    try:
        # when one is cancelled, then nothing of it is left, without a collector, before the next step,
        assert told.engine.cancel("gone")
        assert [ref() for ref in held] == [None] * 2
    finally:
        gc.enable()
    # and the next step tells its end; the other is as if it had been alone.
    told.step()
    assert told.finished == {"gone": ImageUsage(4, 0)}
    told.run()
    assert torch.equal(told.latents["stays", 0], alone(schnell, params(num_inference_steps=4)).latents["alone", 0])
    assert not told.engine.cancel("gone")


def test_a_request_can_be_cancelled_before_it_begins_and_while_its_file_is_written(schnell):
    told = Told(DiffusionEngine(*schnell))
    told.engine.add("early", params())
    assert told.engine.cancel("early")
    told.engine.add("late", params())
    while ("late", 0) not in told.latents:
        told.step()
    if "late" not in told.finished:
        assert told.engine.cancel("late")
    told.run()
    assert set(told.finished) == {"early", "late"}
    assert told.engine.stats()["running"] == told.engine.stats()["waiting"] == 0


def test_a_picture_whose_latents_break_fails_alone(schnell, monkeypatch):
    # Given a batch of three, when one of them becomes NaN in a step,
    told = Told(DiffusionEngine(*schnell))
    spoil_velocity(monkeypatch, seed=66)
    for name, seed in (("a", 1), ("bad", 66), ("c", 2)):
        told.engine.add(name, params(seed=seed, num_inference_steps=3))
    told.run()
    # then its request fails with what happened, and its mates are as they are alone.
    assert isinstance(told.errors["bad"], NumericalError)
    assert "not finite" in told.errors["bad"].message
    assert set(told.finished) == {"a", "c"}
    for name, seed in (("a", 1), ("c", 2)):
        assert torch.equal(
            told.latents[name, 0], alone(schnell, params(seed=seed, num_inference_steps=3)).latents["alone", 0]
        )


def spoil_velocity(monkeypatch, seed: int) -> None:
    whole = canvas_module._velocity

    def spoiled(canvases, *rest):
        velocity = whole(canvases, *rest).clone()
        for number, canvas in enumerate(canvases):
            if canvas.seed == seed:
                velocity[number, 0, 0] = float("nan")
        return velocity

    monkeypatch.setattr(canvas_module, "_velocity", spoiled)


class Fragile:
    """`move`, which fails whenever `breaks` says so of a batch."""

    def __init__(self, monkeypatch, breaks, error: Exception) -> None:
        self.sizes: list[int] = []
        whole = engine_module.move

        def move(canvases, pipeline):
            self.sizes.append(len(canvases))
            if breaks(canvases):
                raise error
            return whole(canvases, pipeline)

        monkeypatch.setattr(engine_module, "move", move)


def test_a_batch_that_memory_does_not_hold_is_halved_and_stays_so(schnell, monkeypatch):
    # Given a device that holds two pictures at a time,
    told = Told(DiffusionEngine(*schnell))
    fragile = Fragile(monkeypatch, lambda canvases: len(canvases) > 2, torch.OutOfMemoryError("no room"))
    for number in range(4):
        told.engine.add(f"r{number}", params(seed=number, num_inference_steps=3))
    told.run()
    # then all are painted, in halves, and the whole batch is not tried again.
    assert not told.errors
    assert len(told.finished) == 4
    assert fragile.sizes == [4, 2, 2, *[2] * 4]
    assert told.engine.stats()["batches_split"] == 1


def test_only_a_picture_that_does_not_fit_alone_fails(schnell, monkeypatch):
    told = Told(DiffusionEngine(*schnell))
    Fragile(monkeypatch, lambda canvases: any(canvas.seed == 2 for canvas in canvases), torch.OutOfMemoryError("no"))
    for number in range(4):
        told.engine.add(f"r{number}", params(seed=number))
    told.run()
    assert set(told.finished) == {"r0", "r1", "r3"}
    assert isinstance(told.errors["r2"], OutOfMemory)


def test_whatever_a_step_fails_of_only_the_guilty_ones_fail(schnell, monkeypatch):
    told = Told(DiffusionEngine(*schnell))
    Fragile(monkeypatch, lambda canvases: any(canvas.seed == 0 for canvas in canvases), RuntimeError("a bug"))
    for number in range(3):
        told.engine.add(f"r{number}", params(seed=number))
    told.run()
    assert set(told.finished) == {"r1", "r2"}
    assert told.errors["r0"].message == "the step with this request failed: RuntimeError"


def test_previews_come_when_asked_for_and_are_small(schnell):
    told = alone(schnell, params(width=160, height=96, num_inference_steps=5, preview_every=2))
    assert [(preview.index, preview.step) for preview in told.previews] == [(0, 2), (0, 4)]
    for preview in told.previews:
        image = Image.open(io.BytesIO(preview.data))
        assert preview.content_type == "image/webp"
        assert max(image.size) <= 64
        assert abs(image.size[0] / image.size[1] - 160 / 96) < 0.4
        assert len(preview.data) < 8192
    # Every step but the last, whose picture follows.
    told = alone(schnell, params(num_inference_steps=3, preview_every=1))
    assert [preview.step for preview in told.previews] == [1, 2]


def test_a_preview_shows_what_the_picture_will_be(schnell):
    # Given the last guess before the end, the picture that came of it, and another picture,
    how = {"width": 64, "height": 64, "num_inference_steps": 16}
    told = alone(schnell, params(**how, preview_every=15))
    other = alone(schnell, params(**how, seed=2))
    preview, picture, stranger = (
        torch.tensor(list(Image.open(io.BytesIO(file)).convert("RGB").tobytes())).float()
        for file in (told.previews[0].data, told.pictures["alone", 0].data, other.pictures["alone", 0].data)
    )
    # then the guess is much nearer to its own picture.
    assert (preview - picture).abs().mean() < 0.4 * (preview - stranger).abs().mean()


def test_a_prompt_is_embedded_once_for_all_requests_with_it(schnell):
    told = Told(DiffusionEngine(*schnell))
    before = schnell[0].prompts.stats()["prompt_cache_misses"]
    for number in range(3):
        told.engine.add(f"r{number}", params("a new prompt", seed=number))
    told.run()
    assert schnell[0].prompts.stats()["prompt_cache_misses"] == before + 1


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": "a red circle " * 20}, "prompt", "tokens, more than max_sequence_length 16"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"init_image": b"no png"}, "image", "no PNG that can be read"),
        ({"init_image": png(48, 64)}, "image", "48 x 64, the picture 48 x 48"),
        ({"init_image": png(48, 48)[:-40]}, "image", "no PNG that can be read"),
        ({"guidance_scale": 3.5}, "guidance_scale", "reads no guidance_scale"),
        ({"width": 17}, "width", "multiple of 16"),
    ],
)
def test_a_bad_request_is_refused_at_the_door(schnell, changes, param, message):
    engine = DiffusionEngine(*schnell)
    with pytest.raises(InvalidRequest, match=message) as refusal:
        engine.add("bad", replace(params(), **changes))
    assert refusal.value.param == param
    assert not engine.has_work


def test_an_id_that_is_running_is_refused(schnell):
    engine = DiffusionEngine(*schnell)
    engine.add("one", params())
    with pytest.raises(InvalidRequest, match="is running"):
        engine.add("one", params())


def test_an_encoder_that_fails_fails_its_request_only(schnell, monkeypatch):
    told = Told(DiffusionEngine(*schnell))
    whole = schnell[0].prompts.embed

    def embed(prompt, length):
        if prompt == "bad":
            raise NumericalError("a text encoder's results for this prompt are not finite")
        return whole(prompt, length)

    monkeypatch.setattr(schnell[0].prompts, "embed", embed)
    told.engine.add("bad", params("bad"))
    told.engine.add("good", params("good"))
    told.run()
    assert set(told.finished) == {"good"}
    assert set(told.errors) == {"bad"}


@pytest.mark.parametrize(("times", "ends"), [(1, True), (2, False)])
def test_painting_without_memory_is_tried_once_more(schnell, monkeypatch, times, ends):
    told = Told(DiffusionEngine(*schnell))
    whole, calls = told.engine.decoder.paint, []

    def paint(latents):
        calls.append(1)
        if len(calls) <= times:
            raise torch.OutOfMemoryError("no room")
        return whole(latents)

    monkeypatch.setattr(told.engine.decoder, "paint", paint)
    told.engine.add("one", params())
    told.run()
    assert (set(told.finished), set(told.errors)) == (({"one"}, set()) if ends else (set(), {"one"}))
    assert len(calls) == 2
    if not ends:
        assert isinstance(told.errors["one"], OutOfMemory)


def test_without_work_a_step_does_nothing(schnell):
    engine = DiffusionEngine(*schnell)
    assert not engine.has_work
    assert not engine.step()
    assert engine.num_steps == 0
