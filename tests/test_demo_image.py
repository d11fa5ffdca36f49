"""The shipped demo image model: its files, the pictures it paints of what it was never taught, its judge, its trainer.

The measured figures are in ops/demo_image/README.md; the floors here are those that the README of the project promises.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import missing
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "ops" / "demo_image"
sys.path.insert(0, str(ROOT / "ops"))

try:
    import transformers
except ImportError:
    transformers = None

import demo_image_data as data  # noqa: E402 - ops/ is no package
import eval_demo_image as exams  # noqa: E402
from demo_image_judge import judge, look  # noqa: E402


@pytest.fixture(scope="module")
def painter():
    torch.set_num_threads(1)
    return exams.ours(FOLDER)


@pytest.fixture
def trainer():
    """The modules that need transformers."""
    if transformers is None:
        missing("transformers")
    import demo_image_autoencoder
    import demo_image_training
    import train_demo_image

    torch.set_num_threads(1)
    return demo_image_autoencoder, demo_image_training, train_demo_image


# -- the folder


def test_the_folder_is_laid_out_as_the_hub_lays_out_flux():
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert found == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"text_encoder{which}/{file}" for which in ("", "_2") for file in ("config.json", "model.safetensors")),
        *(f"tokenizer/{file}" for file in ("merges.txt", "vocab.json")),
        "tokenizer_2/tokenizer.json",
        *(f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in
          ("special_tokens_map.json", "tokenizer_config.json")),
        *(f"{network}/{file}" for network in ("transformer", "vae") for file in
          ("config.json", "diffusion_pytorch_model.safetensors")),
    }  # fmt: skip
    assert (FOLDER / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000


def test_the_model_is_schnell_like():
    transformer = json.loads((FOLDER / "transformer" / "config.json").read_text())
    scheduler = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert transformer["guidance_embeds"] is False
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (1.0, False)


def test_every_shipped_weight_is_a_finite_float16():
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.float16 and bool(tensor.isfinite().all()), (path.name, name)


# -- the judge and the data


def test_the_judge_knows_every_drawn_scene():
    rng = random.Random(7)
    for combination in data.combinations(held_out=True)[::2]:
        scene = data.draw_scene(rng, combination)
        for width, height in ((128, 128), (160, 96)):
            verdict = judge(data.paint(scene, rng, width, height), scene)
            assert verdict.all_three and verdict.place and verdict.size, (scene, verdict)


@pytest.mark.parametrize(
    "change", [{"shape": "square"}, {"colour": "blue"}, {"background": "green"}, {"size": "large"}, {"place": "left"}]
)
def test_the_judge_says_which_part_is_wrong(change):
    asked = data.Scene("circle", "red", "white")
    painted = data.paint(data.Scene(**(vars(asked) | change)), None)
    verdict = vars(judge(painted, asked))
    assert {name for name, right in verdict.items() if not right} == set(change)


def test_the_judge_sees_no_shape_where_there_is_none():
    plain = np.full((128, 128, 3), data.COLOURS["blue"], dtype=np.uint8)
    blot = plain.copy()
    blot[20:110, 60:63] = data.COLOURS["red"]
    assert look(plain).shape == look(blot).shape == ""


def test_training_never_sees_what_is_held_out():
    taught, kept = set(data.combinations(held_out=False)), set(data.combinations(held_out=True))
    assert not taught & kept
    assert len(kept) >= 100
    assert len(taught) + len(kept) == len(data.SHAPES) * len(data.COLOURS) * (len(data.COLOURS) - 1)
    # and every word of what is kept is taught in other company
    for place in range(3):
        assert {combination[place] for combination in kept} <= {combination[place] for combination in taught}


def test_a_caption_says_the_shape_its_colour_and_a_background_that_is_not_white():
    rng = random.Random(0)
    for _ in range(300):
        scene = data.draw_scene(rng, rng.choice(data.combinations(held_out=False)))
        text = data.caption(scene, rng).lower()
        for known, said in ((data._SHAPE_WORDS, scene.shape), (data._COLOUR_WORDS, scene.colour)):
            assert any(word in text for word in known.get(said, (said,))), (text, scene)
        grounds = data._COLOUR_WORDS.get(scene.background, (scene.background,))
        assert scene.background == data.PLAIN or any(word in text for word in grounds), (text, scene)


# -- the pictures


def test_it_paints_what_readme_shows(painter):
    for seed in range(3):
        [picture] = painter(["a red circle on a blue background"], 128, 128, seed)
        sight = look(picture)
        assert (sight.colour, sight.shape, sight.background) == ("red", "circle", "blue")


def test_it_paints_combinations_that_it_was_never_taught(painter):
    # Given 100 held-out prompts, when each is painted once in four steps,
    exam = exams.held_out(100, seed=99)
    verdicts = exams.verdicts(exam, painter(exam.prompts, exam.width, exam.height, 0))
    # then at least 80 have colour and shape right, and at least 95 the background.
    assert sum(verdict.colour and verdict.shape for verdict in verdicts) >= 80
    assert sum(verdict.background for verdict in verdicts) >= 95


def test_other_sizes_do_not_break_it(painter):
    for width, height in ((96, 96), (160, 128)):
        exam = exams.held_out(12, seed=5, width=width, height=height)
        verdicts = exams.verdicts(exam, painter(exam.prompts, width, height, 0))
        assert sum(verdict.colour and verdict.background for verdict in verdicts) >= 9


@pytest.mark.filterwarnings("ignore")
def test_diffusers_paints_the_same_pictures(painter, trainer):
    exam = exams.held_out(4, seed=11)
    mine = painter(exam.prompts, 128, 128, 20)
    theirs = exams.reference(FOLDER)(exam.prompts, 128, 128, 20)
    for a, b in zip(mine, theirs, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


# -- the trainer


def test_captions_fit_and_none_of_their_words_is_spelled(trainer):
    clip = transformers.CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    t5 = transformers.T5TokenizerFast.from_pretrained(FOLDER / "tokenizer_2")
    for word in data.words():
        assert len(clip.tokenize(word)) == 1
        assert len(t5.tokenize(word)) == len(t5.tokenize(word.capitalize())) == 1
    exam = exams.held_out(300, seed=3)
    assert max(len(ids) for ids in t5(list(exam.prompts)).input_ids) <= t5.model_max_length


def test_the_shipped_configuration_is_the_trainers(trainer):
    parts = trainer[2].parts
    for folder, config in (("transformer", parts.transformer_config()), ("vae", parts.vae_config())):
        shipped = json.loads((FOLDER / folder / "config.json").read_text())
        assert {name: shipped[name] for name in config} == config
    assert json.loads((FOLDER / "model_index.json").read_text()) == parts.MODEL_INDEX
    assert json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text()) == parts.SCHEDULER


def test_an_untrained_autoencoder_already_carries_colours(trainer):
    autoencoder, _, train = trainer
    torch.manual_seed(0)
    vae = train.AutoencoderKL(**train.parts.vae_config())
    autoencoder.prepare(vae)
    flat = torch.tensor([0.5, -0.2, 0.8]).view(1, 3, 1, 1).expand(1, 3, 64, 64).contiguous()
    before_norm = []
    vae.encoder.conv_norm_out.register_forward_hook(lambda module, given, out: before_norm.append(given[0]))
    vae.decoder.conv_norm_out.register_forward_hook(lambda module, given, out: before_norm.append(given[0]))
    with torch.no_grad():
        vae.encode(flat)
        vae.decoder(torch.cat([flat[:, :, :8, :8], torch.zeros(1, 13, 8, 8)], dim=1))
    for features in before_norm:
        middle = features[0, :3, features.shape[2] // 2, features.shape[3] // 2]
        torch.testing.assert_close(middle, flat[0, :, 0, 0], atol=1e-4, rtol=1e-4)


def test_an_interrupted_training_run_ends_in_the_same_weights(trainer, tmp_path, monkeypatch):
    _, training, train = trainer
    monkeypatch.setattr(training, "ALBUM", ((32, 32, 8), (48, 32, 4)))
    monkeypatch.setattr(training, "LATE_ALBUM", ((32, 32, 8), (48, 32, 4)))
    plan = training.Plan(seed=3, loose_steps=2, exact_steps=1, late_steps=1, batch_size=4, peak_lr=1e-3, warmup_steps=1)
    vae = train.AutoencoderKL(**train.parts.vae_config()).requires_grad_(False)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)

    def run(stops):
        kept = None
        for first, last in zip((0, *stops), (*stops, plan.steps), strict=True):
            captions, student = train.new_student(plan, tmp_path)
            if kept is not None:
                student.restore(kept)
            for step in range(first, last):
                pages = training.album(vae, plan.seed, plan.part(step))
                student.learn(step, training.lesson(pages, captions, plan, step))
            torch.save(student.state(), tmp_path / "state")
            kept = torch.load(tmp_path / "state")
        return kept["mean"]

    for straight, resumed in zip(run(()), run((1, 3)), strict=True):
        assert torch.equal(straight, resumed)
