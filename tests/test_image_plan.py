"""`inferfleet models plan` of an image model: its parts, its licence, and whether a GPU holds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakehub import COMMIT, FakeHub
from small_pipeline import SHAPES, change, write

from inferfleet.engine.diffusion.components import STEMS
from inferfleet.engine.diffusion.licence import DEV
from inferfleet.engine.diffusion.pipeline import load_pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.plan import plan
from inferfleet.engine.progress import Progress
from inferfleet.workers.cli_image_plan import image_problem, image_rows

#: FLUX.1 dev as published.
PUBLISHED = {
    "transformer/config.json": {
        "guidance_embeds": True,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae/config.json": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
    },
    "text_encoder/config.json": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 49_408,
    },
    "text_encoder_2/config.json": {
        "d_ff": 10_240,
        "d_kv": 64,
        "d_model": 4096,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32_128,
    },
}
GIB = 1 << 30


@pytest.fixture
def published(tmp_path) -> str:
    """The configuration of FLUX.1 dev without weights."""
    write(tmp_path, shape=SHAPES[3])
    for file, values in PUBLISHED.items():
        change(tmp_path / file, **values)
        for weights in (tmp_path / file).parent.glob("*.safetensors"):
            weights.unlink()
    return str(tmp_path)


def test_the_published_model_has_its_published_size(published):
    found = plan(published)

    numbers = {part["name"]: part["numbers"] for part in found["components"]}
    assert numbers == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }
    assert (found["kind"], found["dtype"], found["guided"]) == ("image", "bfloat16", True)
    assert found["resident_bytes"] == 2 * sum(numbers.values())
    # Offloaded, the first block of T5 and CLIP's embedding are the most that is there at once.
    assert found["offloaded_bytes"] == found["resident_bytes"] - 2 * 4_762_310_656 - 2 * 123_060_480 + 2 * (
        192_948_224 + 49_408 * 768 + 77 * 768
    )
    assert plan(published, dtype="float32")["resident_bytes"] == 2 * found["resident_bytes"]
    assert plan(published, quantization="int8")["resident_bytes"] < 0.7 * found["resident_bytes"]


def test_a_gpu_holds_it_whole_or_with_its_encoders_away_or_not_at_all(published):
    for gigabytes, encoders, word in ((80, "resident", "48.6 GiB"), (24, "offloaded", "offloaded"), (16, None, "")):
        found = plan(published, gpu_memory=gigabytes * GIB)

        assert found["memory"]["encoders"] == encoders
        rows = dict(image_rows(found))
        assert word in rows["GPU memory"]
        assert (image_problem(found) is None) == (encoders is not None)
    assert "even with encoders" in image_problem(found)
    # Coded, with its modulations in int8 whatever the kind.
    for gigabytes, encoders in ((16, "offloaded"), (20, "resident")):
        assert plan(published, gpu_memory=gigabytes * GIB, quantization="int4")["memory"]["encoders"] == encoders


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_plan_is_what_loading_takes(tmp_path, quantization):
    write(tmp_path, 0, dtype=torch.bfloat16)

    found = plan(str(tmp_path), quantization=quantization)
    pipeline = load_pipeline(DiffusionSpec(path=str(tmp_path), device="cpu", quantization=quantization), Progress())

    sizes = {part["name"]: part["resident_bytes"] for part in found["components"]}
    for name, module in (
        ("vae", pipeline.vae),
        ("text_encoder", pipeline.prompts._clip),
        ("text_encoder_2", pipeline.prompts._t5),
    ):
        assert sizes[name] == sum(tensor.nbytes for tensor in module.state_dict().values()), name
    stored = {part["name"]: part["stored"]["num_bytes"] for part in found["components"]}
    assert all(stored[name] == sizes[name] for name in STEMS if name != "transformer" or quantization is None)


def test_a_person_is_told_one_fact_a_line(tmp_path):
    write(tmp_path, 1)

    rows = dict(image_rows(plan(str(tmp_path))))

    assert rows["family"] == "flux (FluxPipeline), guided"
    assert rows["licence"] == f"{DEV}: to be read and accepted on https://huggingface.co/black-forest-labs/FLUX.1-dev"
    assert rows["files"].endswith("of safetensors (F32)")
    assert set(STEMS) < set(rows)
    write(tmp_path / "other", 0)
    assert dict(image_rows(plan(str(tmp_path / "other"))))["licence"] == "apache-2.0"


@pytest.mark.parametrize(
    "settings", [{"max_model_len": 512}, {"max_num_seqs": 2}, {"tensor_parallel_size": 2}, {"dtype": "float64"}]
)
def test_settings_of_language_models_are_refused(tmp_path, settings):
    write(tmp_path, 0)
    with pytest.raises(LoadError) as caught:
        plan(str(tmp_path), **settings)
    assert caught.value.param == next(iter(settings))


def test_a_hub_id_is_planned_from_configuration_and_headers(tmp_path):
    # Given a repository whose transformer and T5 lie in two files each,
    folder = tmp_path / "tiny"
    write(folder, 0, shards=2)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with FakeHub(files) as repository:
        env = {**os.environ, "HF_TOKEN": "", "HF_ENDPOINT": repository.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "inferfleet.workers.cli", "models", "plan", "tiny/open", "--json"]
        # when it is planned by its hub id,
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    # then no whole file of weights came, and the plan is that of the folder, at a commit.
    assert done.returncode == 0, done.stderr
    weights = list((tmp_path / "home").rglob("*.safetensors"))
    assert weights == []
    here = plan(str(folder))
    licence = here["licence"] | {"url": "https://huggingface.co/tiny/open"}
    assert json.loads(done.stdout) == here | {"path": "tiny/open", "commit": COMMIT, "licence": licence}
    assert Path(here["path"]) == folder
