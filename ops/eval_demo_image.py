"""Measures the demo image model on combinations of shape and colours that no training run has seen.

    .venv/bin/python ops/eval_demo_image.py ops/demo_image [--prompts 200]

Our engine paints each prompt once, in four steps, and demo_image_judge.py says what is in the picture. With
`--reference` diffusers' own pipeline (extra `oracle`) paints them too, and the pictures are compared.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_image_data import Scene, caption, combinations, draw_scene
from demo_image_judge import Verdict, judge
from numpy.typing import NDArray

from inferfleet.engine.offline import ImageGenerator

Picture = NDArray[np.uint8]
#: Paints prompts, number k from `seed + k`, at a width and a height.
Paint = Callable[[Sequence[str], int, int, int], list[Picture]]
NUM_STEPS = 4
# Ways of asking that demo_image_data.py does not have, made of words that it has.
NEW_WAYS = (
    "one {colour} {shape} on the {background} background",
    "the background is {background}, the {shape} is {colour}",
    "show me {background} with a {colour} {shape}",
    "i want the {shape} {colour} and the background {background}",
    "please make a picture of a {colour} {shape} in front of {background}",
)


@dataclass(frozen=True)
class Exam:
    """Prompts of one kind and what each asks for."""

    name: str
    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    width: int = 128
    height: int = 128
    seed: int = 0


def exams(count: int, seed: int = 1234) -> list[Exam]:
    """The same for the same count and seed; every held-out combination comes as often as any other, or nearly."""
    return [
        held_out(count, seed),
        held_out(count, seed, name="the same prompts, other noise", noise=10_000),
        plain(seed),
        reworded(count // 2, seed),
        held_out(count // 4, seed + 1, name="96x96", width=96, height=96),
        held_out(count // 4, seed + 1, name="160x160", width=160, height=160),
        held_out(count // 4, seed + 1, name="160x128", width=160, height=128),
    ]


def held_out(
    count: int, seed: int, *, name: str = "held out", width: int = 128, height: int = 128, noise: int = 0
) -> Exam:
    """Captions of combinations never trained, of every size and place."""
    rng = random.Random(seed)
    scenes = _scenes(count, rng)
    return Exam(name, tuple(caption(scene, rng) for scene in scenes), scenes, width, height, noise)


def plain(seed: int) -> Exam:
    """Every held-out combination once, said in the plainest words."""
    scenes = tuple(Scene(*combination) for combination in combinations(held_out=True, late=True))
    prompts = []
    for scene in scenes:
        articles = ["an" if word[0] in "aeiou" else "a" for word in (scene.colour, scene.background)]
        prompts.append(f"{articles[0]} {scene.colour} {scene.shape} on {articles[1]} {scene.background} background")
    return Exam("every held-out combination in plain words", tuple(prompts), scenes, seed=seed)


def reworded(count: int, seed: int) -> Exam:
    """Held-out combinations in sentences that training does not have."""
    rng = random.Random(seed)
    scenes = tuple(Scene(scene.shape, scene.colour, scene.background) for scene in _scenes(count, rng))
    prompts = tuple(rng.choice(NEW_WAYS).format(**vars(scene)) for scene in scenes)
    return Exam("in sentences never taught", prompts, scenes)


def _scenes(count: int, rng: random.Random) -> tuple[Scene, ...]:
    kept = combinations(held_out=True, late=True)
    rng.shuffle(kept)
    return tuple(draw_scene(rng, kept[number % len(kept)], late=True) for number in range(count))


def ours(folder: Path) -> Paint:
    """inferfleet's engine, as a user of the offline face sees it, in float32."""
    painter = ImageGenerator(str(folder), device="cpu", dtype="float32")

    def paint(prompts: Sequence[str], width: int, height: int, seed: int) -> list[Picture]:
        images = painter.generate(prompts, width=width, height=height, seed=seed, num_inference_steps=NUM_STEPS)
        assert isinstance(images, list)
        return [np.asarray(image.convert("RGB")) for image in images]

    return paint


def reference(folder: Path) -> Paint:
    """diffusers' pipeline with transformers' encoders, one prompt at a time, in float32."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, low_cpu_mem_usage=False).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    longest = pipeline.tokenizer_2.model_max_length

    def paint(prompts: Sequence[str], width: int, height: int, seed: int) -> list[Picture]:
        pictures = []
        for number, prompt in enumerate(prompts):
            painted = pipeline(
                prompt,
                width=width,
                height=height,
                num_inference_steps=NUM_STEPS,
                guidance_scale=0.0,
                max_sequence_length=longest,
                generator=torch.Generator("cpu").manual_seed(seed + number),
                output_type="np",
            ).images[0]
            pictures.append(np.round(painted * 255).astype(np.uint8))
        return pictures

    return paint


def verdicts(exam: Exam, pictures: Sequence[Picture]) -> list[Verdict]:
    """One for each prompt."""
    return [judge(picture, scene) for picture, scene in zip(pictures, exam.scenes, strict=True)]


def table(folder: Path, count: int, *, with_reference: bool = False) -> str:
    """Markdown: what our engine's pictures have right, in percent of each exam's prompts."""
    paint = ours(folder)
    lines = ["| prompts | number | colour | background | shape | colour and shape | all three | place | size |"]
    lines.append("|---" * 9 + "|")
    first: tuple[Exam, list[Picture]] | None = None
    for exam in exams(count):
        pictures = paint(exam.prompts, exam.width, exam.height, exam.seed)
        first = first or (exam, pictures)
        lines.append(_row(exam, verdicts(exam, pictures)))
    if with_reference and first is not None:
        lines += ["", agreement(folder, *first)]
    return "\n".join(lines)


def _row(exam: Exam, seen: Sequence[Verdict]) -> str:
    rights = [
        [verdict.colour for verdict in seen],
        [verdict.background for verdict in seen],
        [verdict.shape for verdict in seen],
        [verdict.colour and verdict.shape for verdict in seen],
        [verdict.all_three for verdict in seen],
        [verdict.place for verdict in seen],
        [verdict.size for verdict in seen],
    ]
    shares = " | ".join(f"{100 * sum(right) / len(right):.1f}" for right in rights)
    return f"| {exam.name} | {len(seen)} | {shares} |"


def agreement(folder: Path, exam: Exam, pictures: Sequence[Picture]) -> str:
    """How far diffusers' pictures of an exam are from ours."""
    theirs = reference(folder)(exam.prompts, exam.width, exam.height, exam.seed)
    furthest = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(pictures, theirs, strict=True))
    same = sum(a == b for a, b in zip(verdicts(exam, pictures), verdicts(exam, theirs), strict=True))
    return (
        f"diffusers' FluxPipeline paints the {len(exam.prompts)} prompts of the first row too: no value of a pixel is"
        f" more than {furthest} of 255 from ours, and {same} verdicts are the same."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--reference", action="store_true", help="compare with diffusers' own pipeline")
    args = parser.parse_args()
    print(table(args.folder, args.prompts, with_reference=args.reference))


if __name__ == "__main__":
    main()
