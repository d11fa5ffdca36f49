"""Per-layer embeddings ("PLE") of Gemma 3n and 4: beside the residual stream, every layer gets its own small vector."""

from __future__ import annotations

from torch import Tensor, nn

from inferfleet.engine.layers.embedding import Embedding
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.place import Place


class PerLayerEmbeddings(nn.Module):
    """For every token a small vector per layer: half looked up by id, half projected from the token's embedding."""

    def __init__(
        self,
        hidden: int,
        size: int,
        num_layers: int,
        num_tokens: int,
        eps: float,
        *,
        place: Place,
    ) -> None:
        """size: P, the width of a layer's vector; num_tokens: rows of the table."""
        super().__init__()
        self.num_layers, self.root = num_layers, hidden**-0.5
        width = size * num_layers
        self.embed_tokens_per_layer = Embedding(num_tokens, width, scale=size**0.5, place=place)
        self.product = Linear(hidden, {"per_layer_model_projection": width}, place=place)
        self.per_layer_projection_norm = RMSNorm(size, eps, "gemma", place=place)

    def forward(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """ids [T] below num_tokens and their scaled embeddings x [T, H] -> [T, L, P]."""
        shape = (len(input_ids), self.num_layers, -1)
        context = self.per_layer_projection_norm((self.product(x) * self.root).view(shape))
        return (context + self.embed_tokens_per_layer(input_ids).view(shape)) * 2.0**-0.5
