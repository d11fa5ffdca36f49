"""A worker's settings become those of a language model or an image model, as the folder says; hub ids are fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from fakehub import COMMIT, FakeHub
from small_checkpoint import checkpoint
from small_pipeline import SHAPES, change, write

from inferfleet.engine import hub
from inferfleet.engine.diffusion.licence import DEV
from inferfleet.engine.diffusion.spec import SHARED, DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.kind import find_spec
from inferfleet.engine.loader import EngineSpec
from inferfleet.engine.progress import Progress
from inferfleet.tasks.settings import ImageSettings, ModelSpec
from inferfleet.workers.host import engine_spec

SMALL = SHAPES[3]


def found(folder: Path, **settings) -> EngineSpec | DiffusionSpec:
    """What the engine process makes of a worker's settings."""
    return find_spec(engine_spec(ModelSpec(path=str(folder), **settings)), Progress())


@pytest.fixture
def pipeline(tmp_path) -> Path:
    write(tmp_path / "pipeline", shape=SMALL)
    return tmp_path / "pipeline"


@pytest.fixture
def language(tmp_path) -> Path:
    (tmp_path / "language").mkdir()
    checkpoint(tmp_path / "language")
    return tmp_path / "language"


def test_the_folder_says_the_kind(pipeline, language):
    text = found(language, dtype="float32", threads=1, max_num_seqs=3)
    image = found(pipeline, dtype="float32", threads=1, image={"max_batch_size": 3, "accept_licence": DEV})

    assert text == EngineSpec(path=str(language), dtype="float32", threads=1, max_num_seqs=3)
    assert image == DiffusionSpec(path=str(pipeline), dtype="float32", threads=1, max_batch_size=3, accept_licence=DEV)
    assert found(pipeline) == DiffusionSpec(path=str(pipeline))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 512),
        ("block_size", 32),
        ("kv_cache_tokens", 512),
        ("max_num_seqs", 2),
        ("max_num_batched_tokens", 64),
        ("paged_attn", False),
        ("prefix_caching", False),
        ("tensor_parallel_size", 2),
        ("matformer_config_path", "slices.csv"),
        ("matformer_slice_name", "small"),
    ],
)
def test_a_setting_of_language_models_is_refused_for_an_image_model(pipeline, field, value):
    with pytest.raises(LoadError, match=f"{field} is {value!r}, but this is an image model") as caught:
        found(pipeline, **{field: value})
    assert caught.value.param == field


def test_a_language_model_of_the_hub_is_then_its_local_folder(language, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda repo, revision, progress: language)

    spec = find_spec({"path": "owner/name", "revision": "main", "max_num_seqs": 3}, Progress())

    assert spec == EngineSpec(path=str(language), max_num_seqs=3)


def test_image_settings_are_refused_for_a_language_model(language):
    with pytest.raises(LoadError, match="image is set, but this is a language model") as caught:
        found(language, image={})
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"image": []}, "image"),
        ({"image": {"dtype": "float32"}}, "image.dtype"),
        ({"image": {"steps": 4}}, "steps"),
        ({"colour": "red"}, "colour"),
        ({"path": None}, "path"),
    ],
)
def test_settings_that_no_model_has_are_named(pipeline, values, param):
    with pytest.raises(LoadError) as caught:
        find_spec({"path": str(pipeline)} | values, Progress())
    assert caught.value.param == param


def test_workers_and_engines_have_the_same_settings_and_defaults():
    """A default that differed would refuse every image model, for a setting that nobody changed."""
    spec = ModelSpec(path="m")
    text, image = EngineSpec(path="m"), DiffusionSpec(path="m")
    for field in fields(EngineSpec):
        if field.name in ModelSpec.model_fields:
            assert getattr(spec, field.name) == getattr(text, field.name), field.name
    own = {field.name for field in fields(DiffusionSpec)} - set(SHARED)
    assert set(ImageSettings.model_fields) == own
    for name in own:
        assert getattr(ImageSettings(), name) == getattr(image, name), name


ASK = """
import json, os, sys
from pathlib import Path
from inferfleet.engine.diffusion.fetching import find_pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.kind import find_spec
from inferfleet.engine.progress import Progress
for image in json.loads(sys.argv[1]):
    told = []
    try:
        spec = find_spec({"path": "tiny/open", **image}, Progress(lambda phase, done, total: told.append(phase)))
        answer = {"path": spec.path, "revision": spec.revision, "kind": type(spec).__name__, "phases": told}
    except LoadError as error:
        answer = {"error": str(error), "param": error.param, "kind": type(error).__name__}
    if "path" in answer:
        # Without a worker, the same folder is found.
        alone = DiffusionSpec(path="tiny/open", **image.get("image", {}))
        assert str(find_pipeline(alone, Progress())) == answer["path"]
    weights = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*.safetensors")]
    print(json.dumps(answer | {"weights": weights}))
"""


def ask(hub_url: str, home: Path, *settings: dict, **environment: str) -> list[dict]:
    """What an engine process makes of the hub's tiny/open, for each of some settings in turn."""
    env = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_TOKEN": "", **environment}
    command = [sys.executable, "-c", ASK, json.dumps(settings)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


#: What a FLUX repository holds besides: the authors' layout, other formats, pictures, code.
UNWANTED = {
    "flux1-schnell.safetensors": b"x",
    "ae.safetensors": b"x",
    "schnell_grid.jpeg": b"x",
    "transformer/diffusion_pytorch_model.bin": b"x",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"x",
    "vae/pipeline.py": b"x",
    "text_encoder_2/tf_model.h5": b"x",
    "text_encoder_3/model.safetensors": b"x",
}


def test_a_pipeline_of_the_hub_is_fetched_once_and_nothing_else_is(tmp_path):
    # Given a repository with a pipeline and much else,
    write(tmp_path / "tiny", 0, shards=2)
    (tmp_path / "tiny" / "LICENSE.md").write_text("Apache 2.0")
    files = files_of(tmp_path / "tiny")
    with FakeHub(files | UNWANTED) as repository:
        # when its hub id is a worker's model, twice,
        first, second = ask(repository.url, tmp_path / "home", {}, {})
        # then every file of the pipeline came once, and no other,
        assert sorted(repository.fetched) == sorted(files)
        assert files_of(Path(first["path"])) == files
        # its folder is a commit's, and progress told of the download.
        assert (Path(first["path"]).name, first["revision"], first["kind"]) == (COMMIT, None, "DiffusionSpec")
        assert first["phases"][0] == "find" and "download" in first["phases"]
        assert second["path"] == first["path"] and "download" not in second["phases"]
    # Without a network, what is there is found.
    (offline,) = ask(repository.url, tmp_path / "home", {}, HF_HUB_OFFLINE="1")
    assert offline["path"] == first["path"]


def test_a_licence_is_accepted_before_the_weights_are_fetched(tmp_path):
    write(tmp_path / "tiny", 1)
    with FakeHub(files_of(tmp_path / "tiny")) as repository:
        settings = ({}, {"image": {"accept_licence": DEV}})
        refused, accepted = ask(repository.url, tmp_path / "home", *settings)

    assert refused["param"] == "accept_licence" and refused["weights"] == []
    assert "https://huggingface.co/tiny/open" in refused["error"]
    assert accepted["kind"] == "DiffusionSpec"
    assert files_of(Path(accepted["path"])) == files_of(tmp_path / "tiny")


def test_a_pipeline_that_is_not_run_is_refused_before_its_weights_are_fetched(tmp_path):
    write(tmp_path / "tiny", 0)
    change(tmp_path / "tiny" / "model_index.json", _class_name="StableDiffusionPipeline")
    with FakeHub(files_of(tmp_path / "tiny")) as repository:
        (refused,) = ask(repository.url, tmp_path / "home", {})

    assert refused["kind"] == "UnsupportedModel" and "StableDiffusionPipeline" in refused["error"]
    assert refused["weights"] == []
