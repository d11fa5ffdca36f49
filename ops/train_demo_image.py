"""Trains the demo image model: a small FLUX pipeline that paints coloured shapes in four steps, on two CPU cores.

    .venv/bin/python ops/train_demo_image.py --out ops/demo_image --state demo-image-state

Needs the extras `worker`, `image` and `oracle`: diffusers' and transformers' classes are what is trained. Pictures and
captions are made up (demo_image_data.py), so there are no epochs. At the end it measures the model on combinations that
it has never seen and writes README.md beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Read when torch loads: threads that wait for each other by spinning make a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import demo_image_parts as parts
import diffusers
import numpy as np
import torch
import transformers
from demo_image_autoencoder import AutoencoderPlan, as_tensor, learn_autoencoder, painted
from demo_image_data import COLOURS, LATE_SHAPES, combinations, draw_scene, paint
from demo_image_judge import judge
from demo_image_training import Captions, Painter, Plan, Student, album, lesson
from diffusers import AutoencoderKL, FluxTransformer2DModel
from eval_demo_image import NUM_STEPS, table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

TOLD_EVERY = 25


class Clock:
    """Wall and CPU seconds of the training, over all its starts."""

    def __init__(self, spent: tuple[float, float] = (0.0, 0.0)) -> None:
        self.wall, self.cpu = time.perf_counter() - spent[0], time.process_time() - spent[1]

    @property
    def spent(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Teller:
    """A line with the mean loss every so many steps."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if (step + 1) % TOLD_EVERY == 0:
            print(f"{self.name} {step + 1}: {np.mean(self.losses):.4f}, {self.clock.spent[0]:.0f} s", flush=True)
            self.losses.clear()


def trained_autoencoder(plan: AutoencoderPlan, folder: Path) -> tuple[AutoencoderKL, Clock]:
    """The autoencoder that `folder` has kept of this plan, or a new one that is then kept there.

    SystemExit when it belongs to another plan.
    """
    kept = folder / "autoencoder.pt"
    vae = AutoencoderKL(**parts.vae_config())
    if kept.exists():
        state = torch.load(kept)
        if state["plan"] != asdict(plan):
            raise SystemExit(f"{kept} belongs to another plan: {state['plan']}")
        vae.load_state_dict(state["weights"])
        vae.register_to_config(**state["scaling"])
        return vae.requires_grad_(False), Clock(state["spent"])
    clock, rng = Clock(), random.Random(plan.seed)
    torch.manual_seed(plan.seed)
    vae = AutoencoderKL(**parts.vae_config())
    known = combinations(held_out=False)
    pool = [draw_scene(rng, rng.choice(known)) for _ in range(plan.scenes)]
    # One thread: its loops are too small to share.
    torch.set_num_threads(1)
    learn_autoencoder(vae, pool, plan, Teller("autoencoder", clock))
    with torch.no_grad():
        some = vae.encode(as_tensor(painted(pool[:128], rng))).latent_dist.mean
    # As FLUX: latents, shifted and scaled, have mean 0 and deviation 1.
    scaling = {"shift_factor": round(float(some.mean()), 4), "scaling_factor": round(1 / float(some.std()), 4)}
    vae.register_to_config(**scaling)
    keep(kept, {"plan": asdict(plan), "weights": vae.state_dict(), "scaling": scaling, "spent": clock.spent})
    return vae.requires_grad_(False), clock


def new_student(plan: Plan, folder: Path) -> tuple[Captions, Student]:
    """Tokenizers, written to `folder`, and untrained networks for them."""
    t5_size = parts.write_t5_tokenizer(folder / "tokenizer_2")
    clip_size = parts.write_clip_tokenizer(folder / "tokenizer")
    torch.manual_seed(plan.seed)
    painter = Painter(
        FluxTransformer2DModel(**parts.transformer_config()),
        CLIPTextModel(CLIPTextConfig(**parts.clip_config(clip_size))),
        T5EncoderModel(T5Config(**parts.t5_config(t5_size))),
    )
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer").backend_tokenizer
    t5 = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    return Captions(clip, t5), Student(painter, plan)


def train(plan: Plan, autoencoder_plan: AutoencoderPlan, out: Path, state: Path, save_every: int) -> Clock:
    """Runs both plans, or what `state` says is left of them, and leaves a pipeline in `out` every so many steps."""
    state.mkdir(parents=True, exist_ok=True)
    vae, clock = trained_autoencoder(autoencoder_plan, state)
    captions, student = new_student(plan, out)
    kept, first = state / "painter.pt", 0
    if kept.exists():
        found = torch.load(kept)
        if found["plan"] != asdict(plan):
            raise SystemExit(f"{kept} belongs to another plan: {found['plan']}")
        student.restore(found["student"])
        first, clock = found["step"], Clock(found["spent"])
    pages, tell = album(vae, plan.seed, plan.part(first)), Teller("painter", clock)
    for step in range(first, plan.steps):
        if step > first and plan.part(step) != plan.part(step - 1):
            pages = album(vae, plan.seed, plan.part(step))
        tell(step, student.learn(step, lesson(pages, captions, plan, step)))
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            progress = {"plan": asdict(plan), "step": step + 1, "spent": clock.spent}
            keep(kept, progress | {"student": student.state()})
            write_pipeline(out, student.mean_weights(), vae)
    return clock


def keep(path: Path, state: dict[str, Any]) -> None:
    """Writes a state in one move."""
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(path)


def write_pipeline(out: Path, weights: dict[str, Tensor], vae: AutoencoderKL) -> None:
    """Everything but the tokenizers and README.md, weights in float16.

    weights: the painter's, by its names.
    """
    clip_size = len(json.loads((out / "tokenizer" / "vocab.json").read_text()))
    t5_size = Tokenizer.from_file(str(out / "tokenizer_2" / "tokenizer.json")).get_vocab_size()
    parts.write_json(out / "model_index.json", parts.MODEL_INDEX)
    parts.write_json(out / "scheduler" / "scheduler_config.json", parts.SCHEDULER)
    scaling = {name: vae.config[name] for name in ("shift_factor", "scaling_factor")}
    networks: list[tuple[str, dict[str, Any], str, dict[str, Tensor]]] = [
        (
            "transformer",
            diffusers_config("FluxTransformer2DModel", parts.transformer_config()),
            "transformer.",
            weights,
        ),
        ("vae", diffusers_config("AutoencoderKL", parts.vae_config() | scaling), "", vae.state_dict()),
        ("text_encoder", transformers_config("CLIPTextModel", parts.clip_config(clip_size)), "clip.", weights),
        ("text_encoder_2", transformers_config("T5EncoderModel", parts.t5_config(t5_size)), "t5.", weights),
    ]
    for name, config, prefix, tensors in networks:
        parts.write_json(out / name / "config.json", config)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        halves = {
            # transformers 5 calls the weights without the level that the hub's files have.
            ("text_model." if name == "text_encoder" and not key.startswith("clip.text_model.") else "")
            + key.removeprefix(prefix): tensor.half().contiguous()
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        save_file(halves, out / name / f"{stem}.safetensors", metadata={"format": "pt"})


def diffusers_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": "0.42.1", **config}


def transformers_config(name: str, config: dict[str, Any]) -> dict[str, Any]:
    kind = "clip_text_model" if name.startswith("CLIP") else "t5"
    return {"architectures": [name], "model_type": kind, "torch_dtype": "float16", **config}


README = """\
---
license: apache-2.0
language: en
tags:
- text-to-image
---
# The demo image model

A FLUX pipeline of {total:,} parameters ({megabytes:.1f} MB in float16) in diffusers' layout, made by
`ops/train_demo_image.py` on pictures and captions that `ops/demo_image_data.py` makes up. It paints one shape
({shapes})
in one of {colours} colours on a background of another, small, of middle size or large, in the middle or at a side, in
{num_steps} steps at {side}x{side}: "a red circle on a blue background". Anything else it does not know.

It is schnell-like: no guidance, shift 1. What a caption leaves out has one meaning (middle size, in the middle, on
white), so that another seed changes a picture little. Prompts have at most {longest} tokens of T5; pads take part in
attention, so give {longest} as `max_sequence_length` to other pipelines than ours, which take it from the tokenizer.

| network | parameters |
|---|---|
{networks}

## Training

Seed {plan.seed}. Autoencoder: {autoencoder.piece_steps} steps of {autoencoder.pieces} pieces of
{autoencoder.piece_side}x{autoencoder.piece_side} pixels, {autoencoder.picture_steps} of {autoencoder.pictures} whole
pictures. Transformer and both text encoders together, from nothing: {plan.loose_steps} steps of {plan.batch_size}
pictures of eight shapes, a little off size and place, {plan.exact_steps} of exact ones, {plan.late_steps} of the five
shapes above alone; peak learning rate
{plan.peak_lr}; Muon on matrices, AdamW on the rest; the moving mean of the weights is what is shipped.
{minutes:.0f} minutes by the clock and {cpu_minutes:.0f} CPU minutes on {cores} cores ({cpu}) that other work shared.
torch {torch}, diffusers {diffusers}, transformers {transformers}.

    .venv/bin/python ops/train_demo_image.py --out ops/demo_image --state demo-image-state

## Accuracy

Training leaves out {held_out} of the {combinations} combinations of shape, colour and background, fixed by hash and the
same for every seed; the prompts here are made of those. Each is painted once by inferfleet's engine, on CPU in float32,
in {num_steps} steps, and judged by counting pixels (`ops/demo_image_judge.py`, which is right on {certain} drawn
pictures of {certain_of}). In percent of the prompts, by `ops/eval_demo_image.py`:

{table}
"""


def report(folder: Path, plan: Plan, autoencoder: AutoencoderPlan, spent: tuple[float, float], prompts: int) -> str:
    """README.md of the pipeline: how it was made and what it paints."""
    counts = {name: num_parameters(folder / name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    rng = random.Random(1)
    drawn = [draw_scene(rng, combination, late=True) for combination in combinations(held_out=True, late=True)]
    return README.format(
        total=sum(counts.values()),
        megabytes=sum(path.stat().st_size for path in folder.rglob("*") if path.name != "README.md") / 1e6,
        shapes=", ".join(LATE_SHAPES),
        colours=len(COLOURS),
        num_steps=NUM_STEPS,
        side=parts.SIDE,
        longest=parts.MAX_LENGTH,
        networks="\n".join(f"| {name} | {count:,} |" for name, count in counts.items()),
        plan=plan,
        autoencoder=autoencoder,
        minutes=spent[0] / 60,
        cpu_minutes=spent[1] / 60,
        cores=os.cpu_count(),
        cpu=cpu_name(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
        held_out=len(drawn),
        combinations=len(drawn) + len(combinations(held_out=False, late=True)),
        certain=sum(judge(paint(scene, rng), scene).all_three for scene in drawn),
        certain_of=len(drawn),
        table=table(folder, prompts, with_reference=True),
    )


def num_parameters(folder: Path) -> int:
    """Numbers in the one weight file of a network."""
    [path] = folder.glob("*.safetensors")
    return sum(tensor.numel() for tensor in load_file(path).values())


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--state", type=Path, required=True, help="folder to go on from and to write to on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece-steps", type=int, default=1800, help="the autoencoder's steps on pieces of pictures")
    parser.add_argument("--picture-steps", type=int, default=100, help="and on whole pictures after them")
    parser.add_argument("--loose-steps", type=int, default=2000, help="the painter's steps on pictures a little off")
    parser.add_argument("--exact-steps", type=int, default=600, help="on exact ones after them")
    parser.add_argument("--late-steps", type=int, default=1050, help="and on those of the last lessons")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of each kind in README.md's table")
    args = parser.parse_args()
    plan = Plan(args.seed, args.loose_steps, args.exact_steps, args.late_steps, args.batch_size, args.peak_lr)
    autoencoder = AutoencoderPlan(args.seed, args.piece_steps, args.picture_steps)
    clock = train(plan, autoencoder, args.out, args.state, args.save_every)
    spent = clock.spent
    # The engine reads the licence from it before it paints what the table needs.
    (args.out / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (args.out / "README.md").write_text(report(args.out, plan, autoencoder, spent, args.prompts))


if __name__ == "__main__":
    main()
