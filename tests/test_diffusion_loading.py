"""A FLUX pipeline's folder becomes a pipeline, or a typed error that names the file and the field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import SHAPES, change, save, write

from inferfleet.engine.diffusion.components import STEMS, read_components
from inferfleet.engine.diffusion.licence import DEV
from inferfleet.engine.diffusion.pipeline import Pipeline, load_pipeline
from inferfleet.engine.diffusion.schedule import ScheduleConfig
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.families import load_model
from inferfleet.engine.model_errors import BadModelConfig, ModelUnavailable, UnsupportedModel, WeightsMismatch
from inferfleet.engine.models.clip_text import ClipText
from inferfleet.engine.models.t5_encoder import T5Encoder
from inferfleet.engine.progress import Progress

#: Of the smallest shape: what is loaded many times over.
SMALL = SHAPES[3]


def load(folder: Path, progress: Progress | None = None, **settings) -> Pipeline:
    spec = DiffusionSpec(path=str(folder), device="cpu", **{"accept_licence": DEV} | settings)
    return load_pipeline(spec, progress or Progress())


def weights_file(folder: Path, component: str) -> Path:
    return folder / component / f"{STEMS[component]}.safetensors"


def embedded(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.prompts.embed("a red circle", 16).t5


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_a_pipeline_is_what_its_files_say(tmp_path, seed):
    # Given a folder as the hub has it, its transformer and T5 in one file or in several,
    shape = write(tmp_path, seed, shards=1 + seed)
    # when it is loaded,
    pipeline = load(tmp_path)
    # then the facts are those of the files,
    assert pipeline.guided == shape.guided
    assert pipeline.max_sequence_length == min(shape.max_length, 512 if shape.guided else 256)
    assert pipeline.default_size == shape.sample_size
    assert pipeline.latent_channels == shape.latent_channels
    assert pipeline.vae_scale == 2 ** (len(shape.vae_channels) - 1)
    assert pipeline.licence.tag == (DEV if shape.guided else "apache-2.0")
    assert pipeline.schedule == ScheduleConfig(3.0 if shape.guided else 1.0, shape.guided)
    assert (pipeline.dtype, pipeline.device.type, pipeline.commit) == (torch.float32, "cpu", None)
    assert set(pipeline.load_seconds) == {"find", "build", "read"}
    # and no weight is left without numbers.
    for module in (pipeline.transformer, pipeline.vae):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    expected = load_file(weights_file(tmp_path, "vae"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_progress_counts_every_byte_that_is_read(tmp_path):
    write(tmp_path, shape=SMALL)
    told: list[tuple[str, int, int]] = []

    progress = Progress(lambda *news: told.append(news), seconds=0)
    load(tmp_path, progress)
    progress.begin("engine")

    sizes = [weights_file(tmp_path, name).stat().st_size for name in STEMS]
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["find", "read", "engine"]
    read = [(done, total) for phase, done, total in told if phase == "read"]
    assert {total for _, total in read} == {sum(sizes)}
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert read[-1][0] == sum(sizes)
    assert len(read) > 50


@pytest.mark.parametrize(
    ("stored", "wanted", "computes_in"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (torch.float16, "float16", torch.float16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(tmp_path, stored, wanted, computes_in):
    write(tmp_path, shape=SMALL, dtype=stored)

    pipeline = load(tmp_path, dtype=wanted)

    assert pipeline.dtype == computes_in
    assert {tensor.dtype for tensor in pipeline.vae.parameters()} == {computes_in}
    assert embedded(pipeline).dtype == computes_in


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ("transformer", "weights are stored as F8_E4M3"),
        ("text_encoder_2", "is stored as torch.float8_e4m3fn"),
        ("vae", "is stored as torch.float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("encoders", ["resident", "offloaded"])
def test_weights_in_a_format_that_is_not_read_are_refused(tmp_path, component, words, encoders):
    write(tmp_path, shape=SMALL)
    path = weights_file(tmp_path, component)
    save(path.parent, path.stem, {name: t.to(torch.float8_e4m3fn) for name, t in load_file(path).items()})

    with pytest.raises(UnsupportedModel, match=words):
        load(tmp_path, encoders=encoders)


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("encoders", ["resident", "offloaded"])
def test_every_tensor_that_does_not_fit_is_named_with_its_component(tmp_path, component, encoders):
    # Given weights of which one is missing, one too many and one of another shape,
    write(tmp_path, shape=SMALL)
    path = weights_file(tmp_path, component)
    tensors = load_file(path)
    name, other = sorted(tensors)[:2]
    del tensors[name]
    tensors["stray.weight"] = torch.zeros(1)
    tensors[other] = tensors[other][..., :1].repeat_interleave(2, -1)
    save(path.parent, path.stem, tensors)

    # when it is loaded, then one error names all three.
    with pytest.raises(WeightsMismatch) as caught:
        load(tmp_path, encoders=encoders)

    own = name.removeprefix("text_model.")
    assert len(caught.value.missing) == 1 and caught.value.missing[0] in (f"{component}/{name}", f"{component}/{own}")
    assert caught.value.extra == (f"{component}/stray.weight",)
    assert caught.value.misshapen[0].startswith(f"{component}/")


@pytest.mark.parametrize("component", STEMS)
def test_damaged_and_absent_weights_are_named(tmp_path, component):
    write(tmp_path, shape=SMALL)
    path = weights_file(tmp_path, component)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelUnavailable, match=f"{path.name} is not a readable safetensors file"):
        load(tmp_path)

    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(UnsupportedModel, match=f"{component} holds neither {path.name} nor .*found pytorch_model.bin"):
        load(tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    write(tmp_path, shape=SMALL, shards=3)
    (tmp_path / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()

    with pytest.raises(ModelUnavailable, match="lacks 1 of 3 shards: diffusion_pytorch_model-00002-of-00003"):
        load(tmp_path)


def test_the_authors_single_file_layout_is_named(tmp_path):
    write(tmp_path, shape=SMALL)
    save(tmp_path / "transformer", STEMS["transformer"], {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)})

    with pytest.raises(UnsupportedModel, match=r"take the repository's transformer folder in diffusers' layout"):
        load(tmp_path)


INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
CLIP, T5, SCHEDULER = "text_encoder/config.json", "text_encoder_2/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "kind", "words"),
    [
        (INDEX, {"_class_name": "StableDiffusionXLPipeline"}, UnsupportedModel, "this engine runs FluxPipeline alone"),
        (INDEX, {"_class_name": "FluxFillPipeline"}, UnsupportedModel, "'FluxFillPipeline'.*not the Fill, Kontext"),
        (INDEX, {"_class_name": ["my_code", "Pipe"]}, UnsupportedModel, "asks to run code"),
        (INDEX, {"text_encoder_2": [None, None]}, UnsupportedModel, "has no text_encoder_2; all of transformer"),
        (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, UnsupportedModel, "vae is diffusers.AutoencoderTiny"),
        (INDEX, {"transformer": ["my_code", "FluxTransformer2DModel"]}, UnsupportedModel, "transformer is my_code."),
        (INDEX, {"scheduler": "FlowMatchEulerDiscreteScheduler"}, BadModelConfig, "scheduler must be a pair"),
        (
            INDEX,
            {"scheduler": ["diffusers", "DDIMScheduler"]},
            UnsupportedModel,
            "scheduler is diffusers.DDIMScheduler",
        ),
        (TRANSFORMER, {"in_channels": 384, "out_channels": 64}, UnsupportedModel, "in_channels is 384.*should be 64"),
        (TRANSFORMER, {"in_channels": 128, "out_channels": 64}, UnsupportedModel, "Fill and Control models"),
        (TRANSFORMER, {"pooled_projection_dim": 25}, BadModelConfig, "pooled_projection_dim is 25, but hidden_size of"),
        (TRANSFORMER, {"joint_attention_dim": 33}, BadModelConfig, "joint_attention_dim is 33, but d_model of"),
        (TRANSFORMER, {"axes_dims_rope": [8, 8, 8]}, BadModelConfig, "axes_dims_rope"),
        (TRANSFORMER, {"num_layers": 10**9}, BadModelConfig, "num_layers"),
        (TRANSFORMER, {"guidance_embeds": "yes"}, BadModelConfig, "guidance_embeds must be true or false"),
        (TRANSFORMER, {"quantization_config": {"load_in_4bit": True}}, UnsupportedModel, "quantization_config"),
        (VAE, {"latent_channels": 4}, UnsupportedModel, "the VAE's 4 channels"),
        (VAE, {"block_out_channels": [8] * 5}, UnsupportedModel, "block_out_channels must be 1 to 4 widths"),
        (VAE, {"block_out_channels": [8, 10**9]}, UnsupportedModel, "block_out_channels must be 1 to 4 widths"),
        (VAE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, UnsupportedModel, "down_block_types"),
        (VAE, {"norm_num_groups": 5}, BadModelConfig, "vae/config.json makes no AutoencoderKL"),
        (VAE, {"layers_per_block": 10**9}, BadModelConfig, "layers_per_block must be at most"),
        (VAE, {"scaling_factor": 0}, BadModelConfig, "scaling_factor must be above 0"),
        (VAE, {"shift_factor": None}, BadModelConfig, "the field shift_factor is missing"),
        (VAE, {"sample_size": 1000}, UnsupportedModel, "sample_size must be a multiple of 16"),
        (CLIP, {"num_attention_heads": 5}, BadModelConfig, "hidden_size 24 is no multiple of 5 heads"),
        (CLIP, {"hidden_act": "swish"}, UnsupportedModel, "hidden_act 'swish' is not one of quick_gelu, gelu"),
        (CLIP, {"vocab_size": 100}, BadModelConfig, "tokenizer has ids up to .*, but its encoder knows only 100"),
        (CLIP, {"num_hidden_layers": 10**9}, BadModelConfig, "num_hidden_layers must be at most"),
        (T5, {"feed_forward_proj": "gated-swish"}, UnsupportedModel, "feed_forward_proj 'gated-swish'"),
        (T5, {"relative_attention_max_distance": 8}, BadModelConfig, "relative_attention_max_distance must be"),
        (T5, {"vocab_size": 100}, BadModelConfig, "tokenizer_2 has ids up to .*, but its encoder knows only 100"),
        (SCHEDULER, {"use_karras_sigmas": True}, UnsupportedModel, "use_karras_sigmas is True"),
        (SCHEDULER, {"time_shift_type": "linear"}, UnsupportedModel, "time_shift_type"),
        (SCHEDULER, {"shift": 0}, BadModelConfig, "shift must be above 0"),
        (SCHEDULER, {"max_image_seq_len": 256}, BadModelConfig, "must differ"),
        ("tokenizer/tokenizer_config.json", {"bos_token": "<nope>"}, BadModelConfig, "tokenizer has ids up to 626"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, BadModelConfig, "model_max_length must be"),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"1": {"x": 1}}}, BadModelConfig, "added_tokens"),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, BadModelConfig, "added_tokens"),
        ("tokenizer_2/tokenizer.json", {"model": {"type": "Nope"}}, BadModelConfig, "tokenizer.json cannot be used"),
    ],
)
def test_a_field_that_makes_no_pipeline_is_named(tmp_path, file, values, kind, words):
    write(tmp_path, shape=SMALL)
    change(tmp_path / file, **values)

    with pytest.raises(kind, match=words):
        load(tmp_path)


@pytest.mark.parametrize("file", [INDEX, TRANSFORMER, VAE, CLIP, T5, SCHEDULER, "tokenizer/vocab.json"])
def test_a_file_that_is_missing_or_no_json_is_named(tmp_path, file):
    write(tmp_path, shape=SMALL)
    (tmp_path / file).write_text("{")
    with pytest.raises(BadModelConfig, match=Path(file).name):
        load(tmp_path)

    (tmp_path / file).unlink()
    with pytest.raises(ModelUnavailable, match=f"there is no {file if file[:3] != 'tok' else 'vocab.json'} in"):
        load(tmp_path)


def test_merges_of_unknown_symbols_are_refused(tmp_path):
    write(tmp_path, shape=SMALL)
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nxyz abc\n")

    with pytest.raises(BadModelConfig, match=r"vocab.json and merges.txt cannot be used"):
        load(tmp_path)


def test_a_sentencepiece_model_alone_is_refused_with_the_remedy(tmp_path):
    write(tmp_path, shape=SMALL)
    (tmp_path / "tokenizer_2" / "tokenizer.json").rename(tmp_path / "tokenizer_2" / "spiece.model")

    with pytest.raises(UnsupportedModel, match=r"spiece.model alone.*save the folder once with transformers'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prompt_cache_bytes": -1}, "prompt_cache_bytes"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_pixels": True}, "max_pixels"),
        ({"encoders": "elsewhere"}, "encoders"),
        ({"dtype": "float64"}, "dtype"),
        ({"loras": ["a"]}, "loras"),
        ({"loras": {"a": 1}}, "loras"),
        ({"quantization": "int3"}, "quantization"),
    ],
)
def test_a_setting_outside_its_limits_is_named(settings, field):
    with pytest.raises(LoadError, match=field) as caught:
        DiffusionSpec(path="m", **settings)
    assert caught.value.param == field


def test_an_image_model_is_no_language_model(tmp_path):
    write(tmp_path, shape=SMALL)

    with pytest.raises(UnsupportedModel, match="is an image model"):
        load_model(str(tmp_path))


BLOCKED = """
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *at: None if name.partition(".")[0] in {names} else found(name, *at)
from inferfleet.engine.diffusion.pipeline import load_pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.progress import Progress
assert "diffusers" not in sys.modules
try:
    pipeline = load_pipeline(DiffusionSpec(path=sys.argv[1], device="cpu"), Progress())
    print(float(pipeline.prompts.embed("a red circle", 16).t5.sum()), "transformers" in sys.modules)
except LoadError as error:
    print(error)
"""


def run_without(names: set[str], folder: Path) -> str:
    command = [sys.executable, "-c", BLOCKED.replace("{names}", repr(names)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_is_not_needed(tmp_path):
    write(tmp_path, 0)
    expected = float(embedded(load(tmp_path)).sum())

    total, imported = run_without({"transformers", "accelerate", "peft", "sentencepiece"}, tmp_path).split()

    assert float(total) == pytest.approx(expected, abs=1e-4)
    assert imported == "False"


def test_without_diffusers_the_error_says_what_to_install(tmp_path):
    write(tmp_path, 0)

    assert "pip install 'inferfleet[image]'" in run_without({"diffusers"}, tmp_path)


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (lambda: ClipText(PUBLISHED_CLIP, dtype=torch.bfloat16), 123.06),
        (lambda: T5Encoder(PUBLISHED_T5, dtype=torch.bfloat16), 4762.31),
    ],
)
def test_the_published_encoders_have_their_published_sizes(build, millions):
    module = build()

    assert sum(weight.numel() for weight in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert all(weight.is_meta for weight in module.parameters())
    staged = [f"{path}.{name}" for path, part in module.stages() for name in part.state_dict()]
    assert sorted(staged) == sorted(module.state_dict())


PUBLISHED_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49_408,
}
PUBLISHED_T5 = {
    "d_ff": 10_240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32_128,
}


def test_reading_a_configuration_opens_no_weights(tmp_path):
    write(tmp_path, 1)
    for component in STEMS:
        weights_file(tmp_path, component).unlink()

    assert read_components(tmp_path).guided
    assert json.loads((tmp_path / INDEX).read_text())["_class_name"] == "FluxPipeline"
