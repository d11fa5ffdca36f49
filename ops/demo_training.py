"""How the demo model learns: batches of dialogue, loss on the answers, one optimizer step. Knows no files.

B rows, T tokens in the longest of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from demo_checkpoint import END_TURN, PAD, TURN, wire
from demo_data import Asker
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Gemma4ForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

# Longer dialogues are left out; attention by relative position carries what is learned here further.
MAX_TRAINING_TOKENS = 320


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn: a warm-up, a slow cosine through the early lessons, a straight way down."""

    seed: int
    steps: int
    early_steps: int
    tokens_per_step: int
    peak_lr: float
    warmup_steps: int = 150
    cosine_steps: int = 3600
    weight_decay: float = 0.05

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` steps."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (min(step, self.early_steps) - self.warmup_steps) / (self.cosine_steps - self.warmup_steps)
        slow = self.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        left = (self.steps - max(step, self.early_steps)) / (self.steps - self.early_steps)
        return slow * (0.01 + 0.99 * left)


class Batches:
    """An endless stream of (input_ids [B, T], answer_mask [B, T]), each of about `tokens_per_step` tokens."""

    POOL = 24

    def __init__(self, tokenizer: Tokenizer, plan: Plan, *, early: bool) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(plan.seed if early else plan.seed + 1)
        self.asker = Asker(self.rng, held_out=False, early=early)
        self.tokens_per_step = plan.tokens_per_step
        self.pad, self.turn, self.end = (tokenizer.token_to_id(token) for token in (PAD, TURN, END_TURN))
        self.model = tokenizer.token_to_id("model")

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            pool = sorted(self._encoded(self.POOL * self.tokens_per_step), key=len)
            batches = list(self._cut(pool))
            self.rng.shuffle(batches)
            for rows in batches:
                yield self._tensors(rows)

    def _encoded(self, num_tokens: int) -> list[list[int]]:
        rows: list[list[int]] = []
        while sum(map(len, rows)) < num_tokens:
            texts = [wire(self.asker.dialogue()) for _ in range(1024)]
            encoded = (e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False))
            rows += [ids for ids in encoded if len(ids) <= MAX_TRAINING_TOKENS]
        return rows

    def _cut(self, pool: list[list[int]]) -> Iterator[list[list[int]]]:
        rows: list[list[int]] = []
        for ids in pool:
            if rows and (len(rows) + 1) * len(ids) > self.tokens_per_step:
                yield rows
                rows = []
            rows.append(ids)
        # The rest of the pool, its longest rows, is a batch too even when it is small.
        yield rows

    def _tensors(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.full((len(rows), max(map(len, rows))), self.pad, dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        # An answer runs from behind `<|turn>model\n` to its `<turn|>`, which it has to say itself.
        opens = np.zeros_like(ids, dtype=bool)
        opens[:, 3:] = (ids[:, :-3] == self.turn) & (ids[:, 1:-2] == self.model)
        closed = np.zeros_like(ids)
        closed[:, 1:] = np.cumsum(ids[:, :-1] == self.end, axis=1)
        inside = np.maximum.accumulate(np.where(opens, closed + 1, 0), axis=1) == closed + 1
        return torch.from_numpy(ids), torch.from_numpy(inside)


def masks(num_tokens: int, window: int) -> dict[str, torch.Tensor]:
    """Additive masks [1, 1, T, T] per layer type. Rows are padded on the right only, so causality hides the padding."""
    query = torch.arange(num_tokens)[:, None]
    key = torch.arange(num_tokens)[None, :]
    causal = key <= query
    sliding = causal & (key > query - window)
    return {
        name: torch.zeros(1, 1, num_tokens, num_tokens).masked_fill(~allowed, -1e9)
        for name, allowed in (("full_attention", causal), ("sliding_attention", sliding))
    }


def answer_loss(model: Gemma4ForCausalLM, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over answer tokens; the head runs on those positions only."""
    positions = torch.arange(ids.shape[1])[None]
    hidden = model.model(
        input_ids=ids,
        attention_mask=masks(ids.shape[1], model.config.sliding_window),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    chosen = hidden[:, :-1][answers[:, 1:]]
    cap = model.config.final_logit_softcapping
    assert cap is not None
    logits = cap * torch.tanh(model.lm_head(chosen) / cap)
    return F.cross_entropy(logits, ids[:, 1:][answers[:, 1:]])


def optimizers_for(model: Gemma4ForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon on the matrices between layers, which learns in fewer steps; AdamW on norms and embeddings."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=plan.peak_lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class FusedNorm(torch.autograd.Function):
    """Gemma's RMSNorm with its derivative written out: a fifth of a step less than autograd's chain of small products.

    x [..., d], weight [d] or None; y = x * rsqrt(mean(x^2) + eps) * weight.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed if weight is None else normed * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        normed, weight, scale = ctx.saved_tensors
        weight_grad = None
        if weight is not None:
            weight_grad = (grad * normed).flatten(0, -2).sum(0)
            grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(-grad.shape[-1])
        return torch.addcmul(grad, normed, along).mul_(scale), weight_grad, None


@contextmanager
def fused_norms() -> Iterator[None]:
    """Inside, transformers' Gemma 4 norms run as FusedNorm (float32 only)."""

    def forward(norm: Gemma4RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return FusedNorm.apply(x, norm.weight if norm.with_scale else None, norm.eps)

    original = Gemma4RMSNorm.forward
    Gemma4RMSNorm.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Gemma4RMSNorm.forward = original  # type: ignore[method-assign]


def learn(
    model: Gemma4ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    ids: torch.Tensor,
    answers: torch.Tensor,
    lr: float,
) -> float:
    """One step; returns the loss."""
    with fused_norms():
        loss = answer_loss(model, ids, answers)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
