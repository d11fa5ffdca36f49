"""How the demo image model's autoencoder learns. Knows pictures, no captions.

B rows; pictures are [B, 3, h, w] from -1 to 1, latents [B, 16, h/8, w/8].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from demo_image_data import Scene, paint
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

Tell = Callable[[int, float], None]
#: Deviation of the noise on latents in training, which are kept near deviation 1: what the painter may err by.
LATENT_NOISE = 0.1


@dataclass(frozen=True)
class AutoencoderPlan:
    """Pieces of pictures first, many small steps; then whole pictures, for norms and attention see the whole."""

    seed: int
    piece_steps: int
    picture_steps: int
    peak_lr: float = 6e-3
    scenes: int = 2000
    pieces: int = 16
    piece_side: int = 32
    pictures: int = 4
    warmup_steps: int = 20

    def lr(self, step: int) -> float:
        """Warm-up, then a straight way down."""
        steps = self.piece_steps + self.picture_steps
        return self.peak_lr * min((step + 1) / self.warmup_steps, 0.02 + 0.98 * (steps - step) / steps)


def as_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """[B, h, w, 3] bytes -> [B, 3, h, w] from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def painted(scenes: list[Scene], rng: random.Random | None, width: int = 128, height: int = 128) -> NDArray[np.uint8]:
    """[B, h, w, 3] bytes."""
    return np.stack([paint(scene, rng, width, height) for scene in scenes])


@torch.no_grad()
def prepare(vae: AutoencoderKL) -> None:
    """Makes the untrained network carry colours from end to end, which random convolutions take long to learn.

    Residual branches begin at zero; the first three channels are the picture, averaged on the way down and
    interpolated on the way up.
    """
    smooth = torch.tensor([0.25, 0.5, 0.25])
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and name.endswith(("conv_in", "conv_shortcut", "0.conv")):
            module.weight[:3] = 0
            module.bias[:3] = 0
            for channel in range(3):
                kernel = module.weight[channel, channel]
                if "upsampler" in name:
                    kernel.copy_(smooth[:, None] * smooth)
                elif "downsampler" in name:
                    kernel[:2, :2] = 0.25
                else:
                    kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1


class ConvMuon:
    """Muon on convolutions as matrices [out, in * k * k], AdamW on the rest: a third of the loss after 100 steps."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        wide = [p for p in model.parameters() if p.ndim >= 2 and min(p.shape[:2]) >= 8]
        ids = {id(p) for p in wide}
        others = [p for p in model.parameters() if id(p) not in ids]
        self.wide = wide
        # Views: a step on the matrix is a step on the convolution.
        self.matrices = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in wide]
        self.optimizers = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, lr: float) -> None:
        """One step with the gradients of the model, which are then gone."""
        for matrix, conv in zip(self.matrices, self.wide, strict=True):
            assert conv.grad is not None
            matrix.grad = conv.grad.view(matrix.shape)
            conv.grad = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def batches(pool: list[Scene], plan: AutoencoderPlan) -> Iterator[Tensor]:
    """The pieces, then the pictures."""
    rng = random.Random(plan.seed)
    many = painted(rng.sample(pool, 2000), rng)
    changes = [np.argwhere((picture[1:, 1:] != picture[:-1, :-1]).any(-1)) for picture in many]
    side, reach = plan.piece_side, many.shape[1] - plan.piece_side
    for _ in range(plan.piece_steps):
        pieces = []
        for _ in range(plan.pieces):
            row = rng.randrange(len(many))
            # Around an edge: most of a picture is flat.
            y, x = changes[row][rng.randrange(len(changes[row]))]
            top, left = (min(max(int(at) - rng.randrange(side), 0), reach) for at in (y, x))
            pieces.append(many[row, top : top + side, left : left + side])
        yield as_tensor(np.stack(pieces))
    for _ in range(plan.picture_steps):
        yield as_tensor(many[rng.sample(range(len(many)), plan.pictures)])


def learn_autoencoder(vae: AutoencoderKL, pool: list[Scene], plan: AutoencoderPlan, tell: Tell) -> None:
    """Trains in place on absolute error; noise on latents of deviation about 1 stands for the usual divergence."""
    prepare(vae)
    optimizer = ConvMuon(vae, plan.peak_lr)
    for step, batch in enumerate(batches(pool, plan)):
        latents = vae.encode(batch).latent_dist.mean
        decoded = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        error = (decoded - batch).abs().mean()
        # Nothing asks for large latents but the noise: hold their mean square at most near 1.
        loss = error + 0.05 * (latents.square().mean() - 1).relu()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(plan.lr(step))
        tell(step, error.item())
    with torch.no_grad():
        # The deviation that the encoder tells is not used in training: small, so that a sample is the mean.
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = -12
