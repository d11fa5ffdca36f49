"""What quantising an image model costs: figures that are right, kept and obeyed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_pipeline import SHAPES, Shape, write

from inferfleet.engine.diffusion import gate, quality
from inferfleet.engine.diffusion.gate import load_gated
from inferfleet.engine.diffusion.loader import load_images
from inferfleet.engine.diffusion.pipeline import load_pipeline
from inferfleet.engine.diffusion.quality import Painted, distances, psnr
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.place import Place
from inferfleet.engine.progress import Progress
from inferfleet.engine.quality import Task, quantise_and_report
from inferfleet.kernels import build
from inferfleet.kernels.quantized import KINDS, quantise
from inferfleet.workers import cli_quantize

#: Compiled kernels lie in the user's cache as well: commands with another cache find them there.
KERNELS = build.cache_folder()
SMALL = Shape(sample_size=32, max_length=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    write(folder, 3, shape=SMALL)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """A cache folder with nothing in it."""
    build.library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/inferfleet/quality"


def spec_of(model: Path, **settings) -> DiffusionSpec:
    return DiffusionSpec(path=str(model), device="cpu", **settings)


def loads(monkeypatch) -> list[str | None]:
    """The quantization of every pipeline that the gate loads from here on."""
    seen: list[str | None] = []

    def load(spec, progress):
        seen.append(spec.quantization)
        return load_pipeline(spec, progress)

    monkeypatch.setattr(gate, "load_pipeline", load)
    return seen


def test_psnr_and_latent_error_are_what_their_formulas_say():
    full, other = torch.zeros(2, 2, 3, dtype=torch.uint8), torch.full((2, 2, 3), 5, dtype=torch.uint8)
    assert psnr(full, other) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(other, full) == psnr(full, other)
    assert psnr(full, full) == 100.0
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    found = distances([Painted(a, full), Painted(a, full)], [Painted(b, other), Painted(a, full)])
    assert found["latent_error"] == {"mean": pytest.approx(0.05), "max": pytest.approx(0.1)}
    assert found["psnr"]["min"] == pytest.approx(34.15, abs=0.01)
    assert found["psnr"]["mean"] == pytest.approx(67.08, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_load_measures_and_the_next_ones_read(kind, model, cache, monkeypatch):
    # Given a model that was never measured,
    seen, spec = loads(monkeypatch), spec_of(model, quantization=kind)
    pipeline, report = load_gated(spec, Progress())
    # then it is loaded in full and then coded, and the figures are those of its pictures.
    assert seen == [None, kind]
    exact = quality.paint(load_pipeline(spec_of(model), Progress()), spec)
    coded = quality.paint(pipeline, spec)
    assert distances(exact, coded) == {name: report[name] for name in ("latent_error", "psnr")}
    assert 0 < report["latent_error"]["mean"] < 0.2
    assert 20 < report["psnr"]["min"] < report["psnr"]["mean"] < 100
    assert (report["pictures"], report["side"], report["steps"]) == (len(quality.PROMPTS), 32, 4)
    assert report["weights"]["bytes_after"] < 0.5 * report["weights"]["bytes_before"]
    # When it is loaded again, then nothing is measured: the report is the one that was kept.
    assert load_gated(spec, Progress())[1] == report
    assert seen == [None, kind, kind]
    assert [json.loads(path.read_text()) for path in cache.iterdir()] == [report]


def test_a_report_is_for_these_weights_this_kind_and_this_number_format(model, tmp_path, monkeypatch):
    # Given a report,
    write(tmp_path / "model", 3, shape=SMALL)
    spec = spec_of(tmp_path / "model", quantization="int8")
    path = gate.report_path(spec)
    # then other settings of the figures have another,
    assert path == gate.report_path(spec_of(tmp_path / "model", quantization="int8", min_psnr=1.0, max_batch_size=2))
    others = [
        gate.report_path(spec_of(tmp_path / "model", quantization="int4")),
        gate.report_path(spec_of(tmp_path / "model", quantization="int8", dtype="bfloat16")),
        gate.report_path(spec_of(model, quantization="int8")),
    ]
    monkeypatch.setattr(quality, "VERSION", 99)
    others.append(gate.report_path(spec))
    monkeypatch.undo()
    # and so have other weights.
    write(tmp_path / "model", 4, shape=SMALL)
    others.append(gate.report_path(spec))
    assert len({path.name, *(other.name for other in others)}) == 6


def test_what_costs_too_much_is_refused_with_its_figures_unless_it_is_allowed(model, monkeypatch):
    # Given a model that int4 moves further than the operator takes,
    spec = spec_of(model, quantization="int4", min_psnr=80.0)
    with pytest.raises(LoadError) as caught:
        load_gated(spec, Progress())
    # then the refusal says how far, over what, and how to have it all the same,
    assert caught.value.param == "quantization"
    for words in ("int4", "dB PSNR", "min_psnr is 80", "latents differ by", "8 pictures of 32 x 32 in 4 steps"):
        assert words in caught.value.message
    assert "allow_low_psnr = true" in caught.value.message
    # and the next one comes before anything is loaded.
    seen = loads(monkeypatch)
    with pytest.raises(LoadError, match="dB PSNR"):
        load_gated(spec, Progress())
    assert seen == []
    # When it is allowed, then it is served, and its card says what it costs.
    card = load_images(spec_of(model, quantization="int4", min_psnr=80.0, allow_low_psnr=True)).card
    assert card["quantization"] == "int4"
    assert card["quantization_report"]["psnr"]["mean"] < 80
    assert seen == ["int4"]


def test_without_a_quantization_nothing_is_measured(model, cache, monkeypatch):
    seen = loads(monkeypatch)
    assert load_gated(spec_of(model), Progress())[1] is None
    assert seen == [None]
    assert not cache.exists()


@pytest.mark.parametrize("how", ["too-large", "runs-out"])
def test_a_model_whose_full_precision_does_not_fit_says_where_to_measure(how, model, monkeypatch):
    # Given a device without room for the exact weights,
    if how == "too-large":
        monkeypatch.setattr(gate, "free_memory", lambda device: 1000)
    else:

        def no_room(spec, progress):
            if spec.quantization is None:
                raise torch.OutOfMemoryError("no room")
            return load_pipeline(spec, progress)

        monkeypatch.setattr(gate, "load_pipeline", no_room)
    spec = spec_of(model, quantization="int8")
    # then the refusal names the command, the file and the setting,
    with pytest.raises(LoadError, match="inferfleet quantize") as caught:
        load_gated(spec, Progress())
    assert caught.value.param == "quantization"
    assert gate.report_path(spec).name in caught.value.message
    assert "allow_low_psnr = true" in caught.value.message
    # and where that is set, the model is served without figures.
    pipeline, report = load_gated(spec_of(model, quantization="int8", allow_low_psnr=True), Progress())
    assert report is None
    assert len(quality.paint(pipeline, spec, ["a"])) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"psnr": {}}', '{"psnr": {"mean": "good"}}'])
def test_a_damaged_report_is_measured_again(content, model, monkeypatch):
    spec = spec_of(model, quantization="int8")
    path = gate.report_path(spec)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert gate.read_report(spec) is None
    monkeypatch.setattr(quality, "PROMPTS", quality.PROMPTS[:1])
    report = load_gated(spec, Progress())[1]
    assert gate.read_report(spec) == report


def test_a_cache_that_cannot_be_written_is_no_reason_to_serve_nothing(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(quality, "PROMPTS", quality.PROMPTS[:1])
    assert load_gated(spec_of(model, quantization="int8"), Progress())[1] is not None
    assert "not kept" in caplog.text


def test_weights_that_paint_nothing_are_refused_in_words(tmp_path):
    write(tmp_path / "model", 3, shape=SMALL)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(LoadError, match=r"the quality of int8 cannot be measured: .*not finite"):
        load_gated(spec_of(tmp_path / "model", quantization="int8"), Progress())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_report_are_those_of_the_weights(model, dtype):
    components = gate.read_components(model)
    from inferfleet.engine.diffusion.linears import build_transformer, slots_of

    slots = slots_of(build_transformer(components.transformer, Place(dtype, torch.device("meta")))).tensors
    numbers = sum(math.prod(slot.shape) for slot in slots.values())
    assert gate.transformer_bytes(components, dtype, None) == numbers * dtype.itemsize
    coded = {name: slot.shape for name, slot in slots.items() if "blocks." in name and name.endswith("weight")}
    expected = numbers * dtype.itemsize
    for shape in (shape for shape in coded.values() if len(shape) == 2):
        expected += quantise(torch.ones(shape), "int8").nbytes - math.prod(shape) * dtype.itemsize
    assert gate.transformer_bytes(components, dtype, "int8") == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_psnr", math.nan),
        ("min_psnr", "25"),
        ("min_psnr", -1),
        ("min_psnr", True),
        ("allow_low_psnr", 1),
        ("quantization", "int3"),
    ],
)
def test_settings_outside_their_limits_name_the_field(field, value):
    with pytest.raises(LoadError) as caught:
        DiffusionSpec(path="x", **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_guided_models_are_measured_with_guidance_and_more_steps(seed, tmp_path):
    shape = (
        Shape(**{**vars(SHAPES[1]), "max_length": 32})
        if seed == 1
        else Shape(guided=True, sample_size=32, max_length=16)
    )
    write(tmp_path / "model", seed, shape=shape)
    spec = spec_of(tmp_path / "model", quantization="int8", accept_licence="flux-1-dev-non-commercial-license")
    report = load_gated(spec, Progress())[1]
    assert (report["steps"], report["guidance_scale"]) == (8, 3.5)
    assert report["psnr"]["mean"] > spec.min_psnr


def command(cache: Path, *arguments: object) -> subprocess.CompletedProcess:
    """`inferfleet quantize` with a cache folder that has the compiled kernels and nothing else."""
    (cache / "inferfleet").mkdir(parents=True, exist_ok=True)
    if KERNELS.is_dir():
        (cache / "inferfleet/kernels").symlink_to(KERNELS)
    words = [sys.executable, "-m", "inferfleet.workers.cli", "quantize", *map(str, arguments)]
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=env)


def test_the_command_makes_the_report_that_a_load_goes_by(model, tmp_path, cache, monkeypatch):
    # Given the command, when it measures a model with a licence that nobody accepted yet,
    write(tmp_path / "dev", 3, shape=SMALL, guided=True)
    done = command(tmp_path / "cache", tmp_path / "dev", "-q", "int8", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    # then it tells what is in the model's folder and in the cache,
    beside = json.loads((tmp_path / "dev/quality_report.json").read_text())
    assert told == beside | {"report": str(tmp_path / "dev/quality_report.json")}
    kept = json.loads(Path(told["kept"]).read_text())
    assert {name: told[name] for name in kept if name != "model"} == {n: v for n, v in kept.items() if n != "model"}
    # and a load measures nothing any more.
    seen = loads(monkeypatch)
    spec = spec_of(tmp_path / "dev", quantization="int8", accept_licence="flux-1-dev-non-commercial-license")
    assert load_gated(spec, Progress())[1] == kept
    assert seen == ["int8"]


def test_the_command_writes_no_coded_folder_of_an_image_model(model, tmp_path):
    with pytest.raises(UnsupportedModel, match="leave -o out"):
        quantise_and_report(Task(path=str(model), kind="int8", device="cpu", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_prompts_are_measured_and_not_kept(model, tmp_path, cache):
    (tmp_path / "prompts").write_text("a hat\na cat\n")
    task = Task(path=str(model), kind="int4", device="cpu", prompts=tmp_path / "prompts", report=tmp_path / "report")
    report = quantise_and_report(task)
    assert (report["pictures"], report["kept"]) == (2, None)
    assert not cache.exists()
    # A prompt that does not fit is named, not cut.
    (tmp_path / "prompts").write_text("a hat " * 40)
    with pytest.raises(LoadError, match="tokens, more than max_sequence_length 32"):
        quantise_and_report(task)


def test_the_table_of_an_image_model_has_its_figures_and_the_verdict(model, tmp_path, monkeypatch, capsys):
    report = quantise_and_report(Task(path=str(model), kind="int4", device="cpu", report=tmp_path / "report"))
    monkeypatch.setattr(cli_quantize, "_ask", lambda arguments: report)
    cli_quantize.quantize("model", "int4")
    shown = capsys.readouterr().out
    for words in (f"mean {report['psnr']['mean']:.1f}", "8 pictures of 32 x 32 in 4 steps", "served (min_psnr is 25"):
        assert words in shown
    report["psnr"]["mean"] = 20.0
    cli_quantize.quantize("model", "int4")
    assert "refused unless allow_low_psnr = true" in capsys.readouterr().out
