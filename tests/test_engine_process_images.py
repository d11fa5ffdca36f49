"""The engine process with an image model, as its parent sees it."""

from __future__ import annotations

import base64
import io
import subprocess
import time

import pytest
import torch
from engine_child import PATIENCE, Child
from PIL import Image
from small_pipeline import write

from inferfleet.engine.diffusion.service import params_of
from inferfleet.engine.errors import InvalidRequest
from inferfleet.engine.offline import ImageGenerator
from inferfleet.engine.process import SIGN_OF_LIFE_SECONDS
from inferfleet.engine.process import Child as Process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    write(folder, 0)
    return folder


def load(folder, child: Child, **spec) -> dict:
    child.send(
        "load", model="tiny", spec={"path": str(folder), "device": "cpu", "dtype": "float32", "threads": 1} | spec
    )
    child.progress = []
    while (message := child.receive())["op"] == "loading":
        child.progress.append(message)
    return message


@pytest.fixture(scope="module")
def child(folder):
    child = Child(None)
    child.card = load(folder, child)["card"]
    yield child
    assert child.close() == 0


def add(child: Child, name: str, **image) -> None:
    usual = {"prompt": "a red circle", "seed": 3, "width": 48, "height": 32, "num_inference_steps": 2}
    usual |= {"max_sequence_length": 32, "init_image": None, "loras": [], "preview_every": None}
    child.send("add", id=name, priority=0, image=usual | image)


def until_end(child: Child, *names: str) -> dict[str, dict]:
    told = {name: {"deltas": [], "usage": None, "error": None} for name in names}
    while any(one["usage"] is None and one["error"] is None for one in told.values()):
        message = child.receive()
        assert message["op"] == "step"
        for delta in message["deltas"]:
            told[delta["id"]]["deltas"].append(delta)
        for end in message["finished"]:
            told[end["id"]]["usage"] = end["usage"]
        for error in message["errors"]:
            told[error["id"]]["error"] = error
    return told


def pixels(delta: dict) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(delta["b64_json"]))).convert("RGB").tobytes()


def test_the_card_says_what_the_model_paints(child):
    seconds = child.card.pop("load_seconds")
    assert set(seconds) == {"find", "build", "read", "warm"}
    assert child.card == child.card | {
        "kind": "image",
        "family": "flux",
        "architecture": "FluxPipeline",
        "guided": False,
        "licence": "apache-2.0",
        "commit": None,
        "dtype": "float32",
        "device": "cpu",
        "quantization": None,
        "loras": [],
        "default_size": 64,
        "default_steps": 4,
        "default_guidance": None,
        "max_sequence_length": 256,
        "max_pixels": 2048 * 2048,
        "max_side": 4096,
        "multiple_of": 16,
        "max_steps": 100,
        "max_batch_size": 8,
    }
    phases = [told["phase"] for told in child.progress]
    assert list(dict.fromkeys(phases)) == ["find", "read", "engine", "smoke"]


def test_requests_are_painted_together_as_the_offline_generator_paints_them(child, folder):
    for number in range(3):
        add(child, f"r{number}", seed=10 * number, n=2, preview_every=1)
    told = until_end(child, "r0", "r1", "r2")
    offline = ImageGenerator(folder, device="cpu", dtype="float32", threads=1)
    how = {"width": 48, "height": 32, "num_inference_steps": 2, "max_sequence_length": 32}
    for number in range(3):
        deltas = told[f"r{number}"]["deltas"]
        pictures = [delta for delta in deltas if delta["kind"] == "picture"]
        expected = offline.generate("a red circle", n=2, seed=10 * number, **how)
        assert [pixels(picture) for picture in pictures] == [image.tobytes() for image in expected]
        assert [picture["seed"] for picture in pictures] == [10 * number, 10 * number + 1]
        assert [(picture["width"], picture["height"]) for picture in pictures] == [(48, 32)] * 2
        progress = [(delta["step"], delta["steps"]) for delta in deltas if delta["kind"] == "progress"]
        assert progress[-1] == (4, 4) and progress == sorted(progress)
        assert len([delta for delta in deltas if delta["kind"] == "preview"]) == 2
        assert told[f"r{number}"]["usage"] == {"input_tokens": 4, "output_tokens": 12}


def test_an_edit_starts_from_its_image(child):
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 30, 30)).save(buffer, "PNG")
    start = base64.b64encode(buffer.getvalue()).decode()
    add(child, "little", init_image=start, strength=0.1, num_inference_steps=8)
    add(child, "all", init_image=start, strength=1.0, num_inference_steps=8)
    add(child, "none", num_inference_steps=8)
    told = until_end(child, "little", "all", "none")
    painted = {name: pixels(told[name]["deltas"][-1]) for name in told}
    # With all of the noise nothing of the image is left, but the noise is drawn after the image's own.
    assert len(set(painted.values())) == 3
    steps = {
        name: [delta for delta in told[name]["deltas"] if delta["kind"] == "progress"][-1]["steps"] for name in told
    }
    assert steps == {"little": 1, "all": 8, "none": 8}


@pytest.mark.parametrize(
    ("image", "param"),
    [
        ({"width": 17}, "width"),
        ({"init_image": "no base64!"}, "image"),
        ({"init_image": base64.b64encode(b"no png").decode()}, "image"),
        ({"loras": [{"name": "nobody", "scale": 1.0}]}, "loras"),
        ({"loras": ["nobody"]}, "loras"),
        ({"seed": None}, "seed"),
        ({"colour": "red"}, "colour"),
        ({"prompt": "a red circle " * 40}, "prompt"),
    ],
)
def test_a_bad_request_is_refused_and_the_process_goes_on(child, image, param):
    add(child, "bad", **image)
    error = until_end(child, "bad")["bad"]["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param)
    add(child, "good")
    assert until_end(child, "good")["good"]["usage"] == {"input_tokens": 4, "output_tokens": 6}


def test_a_chat_is_refused_by_an_image_model(child):
    child.add("chat")
    error = until_end(child, "chat")["chat"]["error"]
    assert error["code"] == "invalid_request" and "image model" in error["message"]


def test_a_cancelled_request_ends_with_its_usage(child):
    add(child, "endless", num_inference_steps=100, n=4)
    assert child.receive()["deltas"][0]["kind"] == "progress"
    child.send("cancel", id="endless")
    assert until_end(child, "endless")["endless"]["usage"] == {"input_tokens": 4, "output_tokens": 0}


def test_a_model_whose_weights_are_spoiled_is_refused_before_it_is_ready(tmp_path):
    write(tmp_path, 0)
    spoil(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.weight")
    child = Child(subprocess.DEVNULL)
    message = load(tmp_path, child)
    assert (message["op"], message["code"]) == ("failed", "load_failed")
    assert "smoke picture failed: the picture's latents are not finite" in message["message"]
    assert child.process.wait(PATIENCE) == 1


def spoil(file, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)


def test_a_step_that_takes_long_gives_signs_of_life():
    # Given a process whose service is in the middle of a step,
    sent = []

    class Engine:
        num_steps = 7

        def stats(self):
            return {"running": 1}

    class Service:
        engine = Engine()

        def news(self):
            from inferfleet.engine.diffusion.output import ImageStepOutput

            return ImageStepOutput()

    process = Process(None)
    process._send = lambda message: sent.append(message)
    process._alive()
    assert not sent  # nothing is loaded yet
    process._service = Service()
    # when its layers go by, then a word is said only after a silence.
    process._last_sent = time.monotonic()
    process._alive()
    assert not sent
    process._last_sent -= SIGN_OF_LIFE_SECONDS
    process._alive()
    assert [(message["op"], message["step"], message["deltas"]) for message in sent] == [("step", 7, [])]


def test_every_part_of_a_request_passes_layers_that_are_listened_to(folder):
    from inferfleet.engine.diffusion.pulse import listen

    generator = ImageGenerator(folder, device="cpu", dtype="float32", threads=1)
    heard = []
    listen(generator.engine.pipeline, lambda: heard.append(phase))
    counts = {}
    for phase in ("words", "more"):
        generator.generate("quite " + phase, width=32, height=32, num_inference_steps=1)
        counts[phase] = len(heard)
    # Two encoders, four blocks of the transformer, and the VAE's convolutions.
    assert counts["words"] > 2 + 4 + 10
    assert counts["more"] == 2 * counts["words"]


def test_null_is_as_good_as_absent_on_the_wire():
    params = params_of({"prompt": "p", "seed": 1, "width": None, "n": None, "strength": None, "embed_prompt": None})
    assert (params.width, params.n, params.strength, params.embed_prompt) == (None, 1, None, False)
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        params_of({"seed": 1})


def test_the_offline_generator_takes_lists_images_and_fields(folder):
    generator = ImageGenerator(folder, device="cpu", dtype="float32", threads=1)
    how = {"width": 32, "height": 32, "num_inference_steps": 1, "max_sequence_length": 16}
    one = generator.generate("a red circle", seed=5, **how)
    several = generator.generate(["a cat", "a red circle"], seed=4, **how)
    assert several[1].tobytes() == one.tobytes()
    assert [image.size for image in several] == [(32, 32)] * 2
    edited = generator.generate("a cat", init_image=Image.new("L", (100, 40), 90), strength=0.5, **how)
    assert edited.size == (32, 32)
    assert torch.equal(generator.latents("a cat", **how)[0], generator.latents("a cat", **how)[0])
    with pytest.raises(InvalidRequest, match="colour"):
        generator.generate("a cat", colour="red")
    with pytest.raises(InvalidRequest, match="multiple of 16"):
        generator.generate(["a cat", "a dog"], width=20, height=16)
    assert not generator.engine.has_work
