"""How the demo image model learns to paint: transformer and both text encoders together. Knows no files.

Flow matching as FLUX: x_s = (1 - s) * picture + s * noise, and the transformer tells v = noise - picture.
B rows, T packed latents of a picture, L tokens of a caption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from demo_image_autoencoder import as_tensor, painted
from demo_image_data import Scene, caption, combinations, draw_scene
from demo_image_parts import MAX_LENGTH, SIDE
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, T5EncoderModel

#: What schnell's four steps ask for.
FOUR_STEPS = (1.0, 0.75, 0.5, 0.25)
#: Width, height and number of the pictures that are encoded once and learned from.
ALBUM = ((SIDE, SIDE, 4200), (96, 96, 300), (160, 160, 300), (160, 128, 300), (96, 128, 300))
LATE_ALBUM = ((SIDE, SIDE, 2600), (96, 96, 80), (160, 160, 80), (160, 128, 80), (96, 128, 80))
#: Share of the batches that are not of the first size.
OTHER_SIZES = 0.12


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Three parts: all shapes and places, a little off what is said; the same, exact; and what the model is for, exact.
    """

    seed: int
    loose_steps: int
    exact_steps: int
    late_steps: int
    batch_size: int
    peak_lr: float
    warmup_steps: int = 60
    average: float = 0.99

    @property
    def steps(self) -> int:
        return self.loose_steps + self.exact_steps + self.late_steps

    def part(self, step: int) -> int:
        """0, 1 or 2."""
        return (step >= self.loose_steps) + (step >= self.loose_steps + self.exact_steps)

    def lr(self, step: int) -> float:
        """Warm-up, a level way, and down through 60 % of the first part; the same anew, down through the third part."""
        done, left = step, (self.loose_steps - step) / (0.6 * self.loose_steps)
        if self.part(step):
            done, left = step - self.loose_steps, (self.steps - step) / self.late_steps
        return self.peak_lr * min((done + 1) / self.warmup_steps, 1.0, 0.01 + 0.99 * left)


class Painter(nn.Module):
    """The three networks that learn together, called as FluxPipeline calls them."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = transformer, clip, t5
        # As DiT: every block begins as the identity, which trains steadily.
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, s: Tensor, clip_ids: Tensor, t5_ids: Tensor, img_ids: Tensor) -> Tensor:
        """x [B, T, 64], s [B], ids [B, 77] and [B, L], img_ids [T, 3] -> velocity [B, T, 64]."""
        # CLIP looks back only: what stands behind the last row's end changes no pooled state.
        longest = int(clip_ids.argmax(1).max()) + 1
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=s,
            pooled_projections=self.clip(clip_ids[:, :longest]).pooler_output,
            encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return velocity


def positions(height: int, width: int) -> Tensor:
    """[T, 3]: 0, row and column of each packed latent; sides in packed latents."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.view(-1, 3)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4 C]: patches of two by two, channels first."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


class Captions:
    """Token ids of captions for both encoders, padded as FluxPipeline pads them."""

    def __init__(self, clip: Tokenizer, t5: Tokenizer) -> None:
        self.clip, self.t5 = clip, t5
        end = clip.get_vocab_size() - 1
        clip.enable_truncation(77)
        clip.enable_padding(length=77, pad_id=end, pad_token=clip.id_to_token(end))
        t5.enable_truncation(MAX_LENGTH)
        t5.enable_padding(length=MAX_LENGTH)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        sides = (tokenizer.encode_batch(list(texts)) for tokenizer in (self.clip, self.t5))
        clip, t5 = (torch.tensor([encoding.ids for encoding in side]) for side in sides)
        return clip, t5


@dataclass(frozen=True)
class Page:
    """Scenes of one size and their latents [N, T, 64], scaled to deviation 1."""

    scenes: list[Scene]
    latents: Tensor
    img_ids: Tensor


@torch.no_grad()
def album(vae: AutoencoderKL, seed: int, part: int) -> list[Page]:
    """Everything that a part of the plan learns from, encoded once. No held-out combination is in it."""
    late = part == 2
    rng, known = random.Random(seed), combinations(held_out=False, late=late)
    pages = []
    for width, height, count in LATE_ALBUM if late else ALBUM:
        # Each combination equally often, at sizes and places drawn for it.
        scenes = [draw_scene(rng, known[i % len(known)], late=late) for i in range(count)]
        rng.shuffle(scenes)
        parts = [
            vae.encode(as_tensor(painted(scenes[i : i + 16], None if part else rng, width, height))).latent_dist.mean
            for i in range(0, count, 16)
        ]
        latents = (torch.cat(parts) - vae.config["shift_factor"]) * vae.config["scaling_factor"]
        pages.append(Page(scenes, pack(latents), positions(height // 16, width // 16)))
    return pages


@dataclass(frozen=True)
class Lesson:
    """One batch, all that the painter is called with, and the velocity that is right."""

    x: Tensor
    s: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    img_ids: Tensor
    velocity: Tensor

    def halves(self) -> list[Lesson]:
        """Two lessons of half the rows."""
        rows = len(self.s) // 2
        return [
            Lesson(self.x[at], self.s[at], self.clip_ids[at], self.t5_ids[at], self.img_ids, self.velocity[at])
            for at in (slice(0, rows), slice(rows, None))
        ]


def lesson(pages: Sequence[Page], captions: Captions, plan: Plan, step: int) -> Lesson:
    """The batch of one step, the same whenever it is asked for."""
    rng = random.Random(f"{plan.seed} {step}")
    noises = torch.Generator().manual_seed(rng.getrandbits(60))
    page = rng.choice(pages[1:]) if rng.random() < OTHER_SIZES else pages[0]
    rows = [rng.randrange(len(page.scenes)) for _ in range(plan.batch_size)]
    clip_ids, t5_ids = captions([caption(page.scenes[row], rng) for row in rows])
    picture = page.latents[rows]
    noise = torch.randn(picture.shape, generator=noises)
    # Half of them the four steps', the rest anywhere.
    s = torch.tensor([rng.choice(FOUR_STEPS) if rng.random() < 0.5 else rng.uniform(0.02, 1.0) for _ in rows])
    at = s[:, None, None]
    return Lesson((1 - at) * picture + at * noise, s, clip_ids, t5_ids, page.img_ids, noise - picture)


def optimizers_for(painter: Painter, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon on the matrices between layers, which learns in fewer steps; AdamW on the rest."""
    inner = ("transformer_blocks", "encoder.block", "encoder.layers")
    named = list(painter.named_parameters())
    chosen = {name for name, p in named if p.ndim == 2 and any(part in name for part in inner) and "bias" not in name}
    matrices = [p for name, p in named if name in chosen]
    others = [p for name, p in named if name not in chosen]
    return [
        torch.optim.Muon(matrices, lr=plan.peak_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class Student:
    """The painter, its optimizers and the moving mean of its weights, which is what is shipped."""

    def __init__(self, painter: Painter, plan: Plan) -> None:
        self.painter, self.plan = painter.train(), plan
        self.names, self.parameters = zip(*painter.named_parameters(), strict=True)
        self.mean = [p.detach().clone() for p in self.parameters]
        self.optimizers = optimizers_for(painter, plan)
        # Two threads with a half each and torch's own loops serial: on a shared machine threads that meet at the end
        # of every small loop wait longer than they work.
        self.pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, part: Lesson) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of some rows."""
        velocity = self.painter(part.x, part.s, part.clip_ids, part.t5_ids, part.img_ids)
        loss = F.mse_loss(velocity, part.velocity)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def learn(self, step: int, batch: Lesson) -> float:
        """One step; returns the loss."""
        (first, ours), (second, theirs) = self.pool.map(self.gradients, batch.halves())
        for parameter, a, b in zip(self.parameters, ours, theirs, strict=True):
            parameter.grad = (a + b) / 2
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.plan.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)
        return (first + second) / 2

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"weights": self.painter.state_dict(), "mean": self.mean, "optimizers": optimizers}

    def restore(self, state: dict[str, Any]) -> None:
        self.painter.load_state_dict(state["weights"])
        self.mean = state["mean"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def mean_weights(self) -> dict[str, Tensor]:
        """The shipped weights by name, each once."""
        return dict(zip(self.names, self.mean, strict=True))
