"""What only Gemma 3n has inside and around its blocks: AltUp, LAuReL, sparse MLPs of several widths, media tokens.

T tokens of a step, S AltUp streams, H hidden, I width of an MLP.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn

from inferfleet.engine.group import Group
from inferfleet.engine.layers.cut_linear import CutLinear
from inferfleet.engine.layers.embedding import Embedding
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.vector import Vector
from inferfleet.engine.place import Place
from inferfleet.kernels.gated_activation import gated_activation
from inferfleet.kernels.rms_norm import rms_norm


class AltUp(nn.Module):
    """The residual stream S times over, of which a block computes the first; the others are predicted and corrected."""

    def __init__(self, hidden: int, num_streams: int, eps: float, *, has_scale: bool, place: Place) -> None:
        super().__init__()
        self.num_streams, self.router_scale = num_streams, 1.0 / hidden
        self.router = Linear(hidden, {"modality_router": num_streams}, place=place.exact)
        self.router_norm = RMSNorm(hidden, eps, "gemma", place=place)
        self.prediction = Linear(num_streams, {"prediction_coefs": num_streams**2}, place=place.exact)
        self.correction = Linear(num_streams, {"correction_coefs": num_streams}, place=place.exact)
        self.correct_output_scale = Vector(hidden, place=place) if has_scale else None

    def predict(self, streams: Tensor) -> Tensor:
        """Streams [T, S, H] before a block -> what they are expected to be after it."""
        mixing = self.prediction(self._modalities(streams[:, 0])).view(-1, self.num_streams, self.num_streams)
        return torch.baddbmm(streams, mixing, streams)

    def correct(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """Moves every stream [T, S, H] by its share of the first one's error against `computed` [T, H]."""
        shares = self.correction(self._modalities(computed)) + 1.0
        return torch.addcmul(predicted, shares.unsqueeze(2), (computed - predicted[:, 0]).unsqueeze(1))

    def scaled(self, first: Tensor) -> Tensor:
        """The first stream [T, H] as the per-layer embedding meets it."""
        return first if self.correct_output_scale is None else first * self.correct_output_scale.values

    def _modalities(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, S] between -1 and 1."""
        return torch.tanh(self.router(self.router_norm(x) * self.router_scale).float()).to(x.dtype)


class Laurel(nn.Module):
    """A learned residual of low rank: x + norm(right(left(x)))."""

    def __init__(self, hidden: int, rank: int, eps: float, *, place: Place) -> None:
        super().__init__()
        self.left = Linear(hidden, {"linear_left": rank}, place=place)
        self.right = Linear(rank, {"linear_right": hidden}, place=place)
        self.post_laurel_norm = RMSNorm(hidden, eps, "gemma", place=place)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_laurel_norm(self.right(self.left(x)))


class SlicedMLP(nn.Module):
    """A gated MLP whose first w inner numbers are an MLP too; a sparse one lets only the gate's high outliers pass.

    In a split model each rank has a comb of the inner numbers, so that all work at every width.
    """

    def __init__(self, hidden: int, intermediate: int, sparsity: float, *, is_cut: bool, place: Place) -> None:
        """sparsity: the share of a Gaussian gate that becomes zero; 0 = none. is_cut: smaller widths will be used."""
        super().__init__()
        self.hidden, self._group = hidden, place.group
        self._inner = inner = place.group.comb(intermediate, "intermediate_size")
        #: How many standard deviations above its mean a gate has to be.
        self.threshold = NormalDist().inv_cdf(sparsity) if sparsity else None
        # Apart, not one under another: the first rows of both must be usable without the rest.
        self.gate = CutLinear(hidden, "gate_proj", inner, is_cut=is_cut, place=place)
        self.up = CutLinear(hidden, "up_proj", inner, is_cut=is_cut, place=place)
        self.down = CutLinear(inner, "down_proj", hidden, is_cut=is_cut, place=place)

    def forward(self, x: Tensor, width: int) -> Tensor:
        """x [T, H] -> [T, H] through the first `width` of the I inner numbers."""
        own = self._inner.below(width)
        gate = self.gate.corner(x, own)
        if self.threshold is not None:
            gate = sparsified(gate, self.threshold, width, self._group)
        inner = gated_activation(torch.cat((gate, self.up.corner(x, own)), dim=1), "gelu_tanh")
        return self.down.corner(inner, self.hidden)


def sparsified(gate: Tensor, threshold: float, width: int, group: Group) -> Tensor:
    """gate [T, I] less its row's mean + threshold standard deviations (of the population), and nothing below zero.

    The row is `width` numbers in all, of which gate has this rank's.
    """
    if group.size > 1:
        exact = gate.float()
        mean = group.sum(exact.sum(dim=1, keepdim=True)) / width
        variance = group.sum((exact - mean).square().sum(dim=1, keepdim=True)) / width
        return torch.relu(exact - mean - variance.sqrt() * threshold).to(gate.dtype)
    cutoff = gate.mean(dim=1, keepdim=True) + gate.std(dim=1, keepdim=True, correction=0) * threshold
    return torch.relu(gate - cutoff)


class MediaTokens(nn.Module):
    """Ids at the end of the vocabulary that belong to a medium: markers and placeholders with a table of their own."""

    def __init__(self, num_tokens: int, size: int, hidden: int, eps: float, *, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.embedding = Embedding(num_tokens, size, place=place)
        self.hard_embedding_norm = RMSNorm(size, eps, "gemma", place=place)
        self.projection = Linear(size, {"embedding_projection": hidden}, place=place)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N] counted from the medium's first -> [N, H], as the text's scaled embeddings."""
        projected = self.projection(self.hard_embedding_norm(self.embedding(ids)))
        return rms_norm(projected, None, self.eps, style="gemma")


def rescaled(x: Tensor, like: Tensor) -> Tensor:
    """x [..., H] with the root mean square of `like` [..., H]."""
    own = x.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-5).sqrt()
    return x * like.pow(2).mean(dim=-1, keepdim=True).sqrt() / own
