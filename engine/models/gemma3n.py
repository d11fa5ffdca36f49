"""Gemma 3n, text, with MatFormer slices: several models in one set of weights, chosen request by request.

A block computes one of S residual streams (AltUp), adds a low-rank residual beside its attention (LAuReL), and feeds
every layer an embedding of its own (PLE). The upper layers read keys and values of the last layers of their kind
below. A slice leaves layers out and uses the first rows of the others' MLPs; what no slice uses is not loaded.

T tokens of a step, S streams, H hidden, L layers, P width of a per-layer embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import Fields, text_section
from inferfleet.engine.errors import LoadError
from inferfleet.engine.layers.attention import AttentionShape
from inferfleet.engine.layers.embedding import Embedding, Head
from inferfleet.engine.layers.gemma_attention import GemmaAttention
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.norm import RMSNorm
from inferfleet.engine.layers.per_layer import PerLayerEmbeddings
from inferfleet.engine.layers.rotary import Rotary
from inferfleet.engine.layers.slots import Weight
from inferfleet.engine.matformer import SliceRow, SliceTable
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.models.decoder import Decoder
from inferfleet.engine.models.gemma3n_layers import AltUp, Laurel, MediaTokens, SlicedMLP, rescaled
from inferfleet.engine.place import Place
from inferfleet.engine.sight import Sight
from inferfleet.kernels.quantized import Quantized

SLIDING, FULL = "sliding_attention", "full_attention"
#: The hub's older keys for the base of the rotary frequencies, and what holds without them.
THETA = {SLIDING: ("rope_local_base_freq", 10_000.0), FULL: ("rope_theta", 1_000_000.0)}
#: The variant that is no slice.
WHOLE = ""
#: Tensors that hold a group of P rows or columns for every layer, and along which dimension.
PER_LAYER = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
MLP_WEIGHT = re.compile(r"layers\.(?P<layer>\d{1,4})\.mlp\.(?P<which>gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class LayerPlan:
    """What sets one layer apart from the others."""

    index: int
    kind: str
    window: int | None
    #: The layer whose keys and values are read: itself, or for a sharing layer the last owner of its kind.
    kv_layer: int
    intermediate: int
    sparsity: float

    @property
    def owns_kv(self) -> bool:
        return self.kv_layer == self.index


#: The (layer index, MLP width) of every layer that a slice computes, in order.
Slice = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gemma3nConfig:
    """The fields of config.json that shape the text model."""

    vocab_size: int
    attention: AttentionShape
    tied: bool
    softcap: float | None
    layers: tuple[LayerPlan, ...]
    ple_size: int
    #: May be smaller than the vocabulary: the ids above have no row of their own there.
    ple_vocab_size: int
    num_streams: int
    has_correct_scale: bool
    laurel_rank: int
    max_positions: int
    rope: Mapping[str, Fields]

    @classmethod
    def read(cls, text: Fields) -> Gemma3nConfig:
        text.refuse("hidden_activation", "gelu_pytorch_tanh")
        text.refuse("altup_active_idx", 0)
        text.refuse("use_bidirectional_attention", False)
        plans = layer_plans(text)
        return cls(
            vocab_size=text.integer("vocab_size"),
            attention=AttentionShape.read(text, default_head_dim=256),
            tied=text.boolean("tie_word_embeddings", True),
            softcap=text.number("final_logit_softcapping") if "final_logit_softcapping" in text else None,
            layers=plans,
            ple_size=text.integer("hidden_size_per_layer_input", 256),
            ple_vocab_size=text.integer("vocab_size_per_layer_input", 262_144),
            num_streams=text.integer("altup_num_inputs", 4, least=2),
            has_correct_scale=text.boolean("altup_correct_scale", True),
            laurel_rank=text.integer("laurel_rank", 64),
            max_positions=text.integer("max_position_embeddings", 32_768),
            rope={kind: _rope(text, kind) for kind in dict.fromkeys(plan.kind for plan in plans)},
        )


def layer_plans(text: Fields) -> tuple[LayerPlan, ...]:
    """Every layer's sizes; raises BadModelConfig where they cannot fit together."""
    count = text.integer("num_hidden_layers")
    kinds = text.list_of(str, "layer_types", [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(count)])
    if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise BadModelConfig(f"{text.where}: layer_types must hold {count} x {SLIDING} or {FULL}")
    shared = text.integer("num_kv_shared_layers", 15, least=0)
    if shared >= count:
        raise BadModelConfig(f"{text.where}: num_kv_shared_layers is {shared}, but there are {count} layers")
    owners = {kind: index for index, kind in enumerate(kinds[: count - shared])}
    if set(kinds) != set(owners):
        raise BadModelConfig(f"{text.where}: a layer that shares keys and values has no owner of its kind below it")
    windows = {SLIDING: text.integer("sliding_window", 512), FULL: None}
    widths, sparsities = _widths(text, count), _sparsities(text, count)
    return tuple(
        LayerPlan(
            index, kind, windows[kind], index if index < count - shared else owners[kind], widths[index],
            sparsities[index],
        )
        for index, kind in enumerate(kinds)
    )  # fmt: skip


def _widths(text: Fields, count: int) -> list[int]:
    if not isinstance(text.values.get("intermediate_size"), list):
        return [text.integer("intermediate_size")] * count
    widths = text.list_of(int, "intermediate_size")
    if len(widths) != count or any(isinstance(width, bool) or width < 1 for width in widths):
        raise BadModelConfig(f"{text.where}: intermediate_size must hold {count} integers of at least 1")
    return widths


def _sparsities(text: Fields, count: int) -> list[float]:
    sparse = 10 if count > 10 else 0
    found = text.list_of(object, "activation_sparsity_pattern", [0.95] * sparse + [0.0] * (count - sparse))
    if len(found) != count or any(type(item) not in (int, float) or not 0 <= item < 1 for item in found):
        raise BadModelConfig(f"{text.where}: activation_sparsity_pattern must hold {count} numbers from 0 to below 1")
    return [float(item) for item in found]


def _rope(text: Fields, kind: str) -> Fields:
    """A kind's rotary settings, by today's keys or by the hub's older ones."""
    old_name, theta = THETA[kind]
    own = dict(text.section("rope_parameters", {}).section(kind, {}).values)
    if kind == FULL:
        own |= text.section("rope_scaling", {}).values
    own.setdefault("rope_theta", text.number(old_name, theta))
    return Fields(own, f"{text.where}: rope_parameters: {kind}")


def slice_of(row: SliceRow, plans: tuple[LayerPlan, ...]) -> Slice:
    """A row of the table as layers of this model; LoadError where the model cannot be cut like that."""
    strange = sorted(row.skipped - set(range(len(plans))))
    if strange:
        raise _bad_slice(row, f"skips layer {strange[0]}, but the model has layers 0 to {len(plans) - 1}")
    kept = [plan for plan in plans if plan.index not in row.skipped]
    if len(row.widths) != len(kept):
        raise _bad_slice(row, f"holds {len(row.widths)} widths for {len(kept)} kept layers")
    if not kept:
        raise _bad_slice(row, "keeps no layer")
    for plan, width in zip(kept, row.widths, strict=True):
        if not 1 <= width <= plan.intermediate:
            raise _bad_slice(
                row, f"gives layer {plan.index} the width {width}; it must be from 1 to {plan.intermediate}"
            )
        if plan.kv_layer in row.skipped:
            raise _bad_slice(row, f"skips layer {plan.kv_layer}, whose keys and values layer {plan.index} reads")
    return tuple((plan.index, width) for plan, width in zip(kept, row.widths, strict=True))


def _bad_slice(row: SliceRow, fault: str) -> LoadError:
    return LoadError(f"the MatFormer slice {row.name!r} {fault}", param="matformer_config_path")


class Block(nn.Module):
    """One layer around all S streams; the work happens on the first."""

    def __init__(self, config: Gemma3nConfig, plan: LayerPlan, cache_index: int, *, is_cut: bool, place: Place) -> None:
        """cache_index: of the layer whose keys and values are read; is_cut: some slice uses a part of the MLP."""
        super().__init__()
        shape = config.attention
        hidden, eps = shape.hidden, shape.eps

        def norm() -> RMSNorm:
            return RMSNorm(hidden, eps, "gemma", place=place)

        self.altup = AltUp(hidden, config.num_streams, eps, has_scale=config.has_correct_scale, place=place)
        self.laurel = Laurel(hidden, config.laurel_rank, eps, place=place)
        self.self_attn = GemmaAttention(shape, cache_index, owns_kv=plan.owns_kv, place=place)
        self.mlp = SlicedMLP(hidden, plan.intermediate, plan.sparsity, is_cut=is_cut, place=place)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.ple_gate = Linear(hidden, {"per_layer_input_gate": config.ple_size}, place=place)
        self.ple_output = Linear(config.ple_size, {"per_layer_projection": hidden}, place=place)
        self.post_per_layer_input_norm = norm()

    def forward(self, streams: Tensor, ple: Tensor, cos: Tensor, sin: Tensor, batch: Batch, width: int) -> Tensor:
        """streams [T, S, H], ple [T, P] of this layer -> [T, S, H]."""
        predicted = self.altup.predict(streams)
        x = predicted[:, 0]
        normed = self.input_layernorm(x)
        attended = self.post_attention_layernorm(self.self_attn(normed, cos, sin, batch))
        x = (x + attended + self.laurel(normed)) * 0.5**0.5
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), width))
        streams = self.altup.correct(predicted, x)
        gate = nn.functional.gelu(self.ple_gate(self.altup.scaled(streams[:, 0])), approximate="tanh")
        # The first stream takes no part of its own embedding: it only reads it off.
        streams[:, 1:] += self.post_per_layer_input_norm(self.ple_output(gate * ple)).unsqueeze(1)
        return streams


class Gemma3nForCausalLM(Decoder):
    """The whole text model; its protocol is families.Model."""

    can_split = True

    def __init__(self, config: Mapping[str, Any], *, place: Place, slices: SliceTable | None = None) -> None:
        """slices: what jobs may ask for beside the whole model; LoadError where the model cannot be cut like that."""
        super().__init__()
        self.config = c = Gemma3nConfig.read(text_section(config))
        self.num_kv_heads = place.group.kv_heads(c.attention.num_kv_heads)
        #: By the name that a request's `variant` gives.
        self.slices = _offered(c.layers, slices)
        self.resident = _resident(c.layers, self.slices)
        #: Layer index -> its place among the resident layers.
        self.places = {plan.index: place_ for place_, plan in enumerate(self.resident)}
        owners = [plan.index for plan in self.resident if plan.owns_kv]
        shape = c.attention
        self.embed_tokens = Embedding(c.vocab_size, shape.hidden, scale=shape.hidden**0.5, place=place)
        self.ple = PerLayerEmbeddings(
            shape.hidden, c.ple_size, len(self.resident), c.ple_vocab_size, shape.eps, place=place
        )
        streams = range(c.num_streams - 1)
        # Every layer meets what these make of a token, so they stay as exact as the embedding and the head.
        exact, spread = place.exact, {f"altup_projections.{i}": shape.hidden for i in streams}
        self.altup_in = Linear(shape.hidden, spread, place=exact)
        self.altup_unembed_projections = nn.ModuleList(
            Linear(shape.hidden, {str(i): shape.hidden}, place=exact) for i in streams
        )
        self.layers = nn.ModuleDict(
            {
                str(plan.index): Block(c, plan, owners.index(plan.kv_layer), is_cut=self._is_cut(plan), place=place)
                for plan in self.resident
            }
        )
        self.norm = RMSNorm(shape.hidden, shape.eps, "gemma", place=place)
        self.lm_head = Head(c.vocab_size, shape.hidden, tied=self.embed_tokens if c.tied else None, place=place)
        self.rotary = nn.ModuleDict(
            {kind: Rotary(rope, shape.head_dim, c.max_positions, device=place.device) for kind, rope in c.rope.items()}
        )

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the slices that requests may ask for."""
        return tuple(name for name in self.slices if name != WHOLE)

    @property
    def cache_spec(self) -> CacheSpec:
        kv_heads, d = self.num_kv_heads, self.config.attention.head_dim
        owners = (plan for plan in self.resident if plan.owns_kv)
        return CacheSpec(tuple(KeyValues(kv_heads, d, Sight(plan.window)) for plan in owners))

    def skipped_tensors(self) -> Iterable[str]:
        """The hub's files hold keys and values of layers that share others'."""
        yield from super().skipped_tensors()
        prefix = re.escape(self.prefix)
        resident = {plan.index for plan in self.resident}
        for plan in self.config.layers:
            if plan.index not in resident:
                yield rf"{prefix}layers\.{plan.index}\..+"
            elif not plan.owns_kv:
                yield rf"{prefix}layers\.{plan.index}\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+"
        if not self.config.has_correct_scale:
            yield rf"{prefix}layers\.\d+\.altup\.correct_output_scale"

    def load(self, weights: Iterable[tuple[str, Weight]]) -> None:
        super().load(self._trimmed(weights))

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """[T] ids and positions -> hidden states [T, H] before the final norm; meaningful at batch.logits_index."""
        variants = batch.variants
        if len(variants) == 1:
            return self._forward_slice(input_ids, positions, batch, self.slices[variants[0]])
        hidden = torch.zeros(len(input_ids), self.config.attention.hidden, dtype=self.embed_tokens.weight.dtype,
                             device=input_ids.device)  # fmt: skip
        for variant in variants:
            tokens, part = batch.only(variant)
            layers = self.slices[variant]
            hidden[tokens] = self._forward_slice(input_ids[tokens], positions[tokens], part, layers)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] of `forward` -> float32 [N, V]. The final norm is here: only sampled rows need it."""
        logits = super().compute_logits(hidden)
        cap = self.config.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def embed(self, input_ids: Tensor) -> Tensor:
        """ids [T] -> [T, H]."""
        return self.embed_tokens(input_ids)

    def _forward_slice(self, input_ids: Tensor, positions: Tensor, batch: Batch, layers: Slice) -> Tensor:
        """`forward` of a batch whose rows all use one slice."""
        x = self.embed(input_ids)
        ple = self.ple(input_ids.where(input_ids < self.config.ple_vocab_size, 0), x)
        angles = {kind: rotary(positions) for kind, rotary in self.rotary.items()}
        owning = [layer for layer in layers if self.config.layers[layer[0]].owns_kv]
        sharing = layers[len(owning) :]
        streams = self._run(owning, self._spread(x), ple, angles, batch)
        # The sharing layers store nothing: only tokens whose logits are wanted need to go through them and to the end.
        index, wanted = batch.logits_index, batch.wanted()
        if wanted is not batch:
            streams, ple = streams[index], ple[index]
            angles = {kind: (cos[index], sin[index]) for kind, (cos, sin) in angles.items()}
        if not len(index):
            return x
        streams = self._run(sharing, streams, ple, angles, wanted)
        return self._gathered(streams) if wanted is batch else x.index_copy(0, index, self._gathered(streams))

    def _run(
        self,
        layers: Iterable[tuple[int, int]],
        streams: Tensor,
        ple: Tensor,
        angles: Mapping[str, tuple[Tensor, Tensor]],
        batch: Batch,
    ) -> Tensor:
        """streams [T, S, H] through some of the layers; ple [T, resident layers, P], angles by kind of layer."""
        for index, width in layers:
            kind = self.config.layers[index].kind
            streams = self.layers[str(index)](streams, ple[:, self.places[index]], *angles[kind], batch, width)
        return streams

    def _spread(self, x: Tensor) -> Tensor:
        """Embeddings x [T, H] -> streams [T, S, H]: x itself and projections of its size."""
        others = self.altup_in(x).view(len(x), -1, x.shape[1])
        return torch.cat((x.unsqueeze(1), rescaled(others, x.unsqueeze(1))), dim=1)

    def _gathered(self, streams: Tensor) -> Tensor:
        """Streams [N, S, H] -> [N, H]: the mean of the first and of the others' projections of its size."""
        first = streams[:, 0]
        back = [rescaled(product(streams[:, i]), first) for i, product in enumerate(self.altup_unembed_projections, 1)]
        return torch.stack((first, *back)).mean(dim=0)

    def _is_cut(self, plan: LayerPlan) -> bool:
        used = (width for layers in self.slices.values() for index, width in layers if index == plan.index)
        return any(width < plan.intermediate for width in used)

    def _trimmed(self, weights: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, Weight]]:
        """The checkpoint's tensors without what no slice uses. One of a wrong shape passes as it is, to be told."""
        plans, size = self.config.layers, self.config.ple_size
        kept = torch.tensor(list(self.places))
        for name, tensor in weights:
            if isinstance(tensor, Quantized):  # a checkpoint with these is loaded whole or not at all
                yield name, tensor
                continue
            part = name.removeprefix(self.prefix)
            if found := MLP_WEIGHT.fullmatch(part):
                dim = 1 if found["which"] == "down" else 0
                index = int(found["layer"])
                if index in self.places and _is_wide(tensor, dim, plans[index].intermediate):
                    tensor = tensor.narrow(dim, 0, self.resident[self.places[index]].intermediate)
            elif part in PER_LAYER and len(kept) < len(plans) and _is_wide(tensor, PER_LAYER[part], len(plans) * size):
                dim = PER_LAYER[part]
                tensor = tensor.unflatten(dim, (-1, size)).index_select(dim, kept).flatten(dim, dim + 1)
            yield name, tensor

    def _checkpoint_name(self, name: str) -> str:
        # The checkpoint keeps the parts of the per-layer embeddings beside the layers, not in a module of their own.
        return super()._checkpoint_name(name.removeprefix("ple."))


def _is_wide(tensor: Tensor, dim: int, size: int) -> bool:
    return tensor.dim() == 2 and tensor.shape[dim] == size


def _offered(plans: tuple[LayerPlan, ...], table: SliceTable | None) -> dict[str, Slice]:
    """What requests may ask for, by name. With a default slice the whole model is only there under a slice's name."""
    whole = {WHOLE: tuple((plan.index, plan.intermediate) for plan in plans)}
    if table is None:
        return whole
    return (whole if table.default is None else {}) | {row.name: slice_of(row, plans) for row in table.rows}


def _resident(plans: tuple[LayerPlan, ...], slices: Mapping[str, Slice]) -> tuple[LayerPlan, ...]:
    """The layers that some slice computes, as wide as the widest needs them."""
    widths: dict[int, int] = {}
    for layers in slices.values():
        for index, width in layers:
            widths[index] = max(width, widths.get(index, 0))
    return tuple(replace(plan, intermediate=widths[plan.index]) for plan in plans if plan.index in widths)


class Gemma3nForConditionalGeneration(Gemma3nForCausalLM):
    """The text model inside the multimodal checkpoints of the hub. Media towers stay unloaded, media *tokens* do not:
    the end of the vocabulary has no rows of its own in the text's table, and a text may hold or become such ids."""

    prefix = "model.language_model."

    def __init__(self, config: Mapping[str, Any], *, place: Place, slices: SliceTable | None = None) -> None:
        super().__init__(config, place=place, slices=slices)
        whole, shape, vocab = Fields(config), self.config.attention, self.config.vocab_size
        vision, audio = whole.section("vision_config", {}), whole.section("audio_config", {})
        starts = [vision.integer("vocab_offset", 262_144), audio.integer("vocab_offset", 262_272)]
        sizes = [vision.integer("vocab_size", 128), audio.integer("vocab_size", 128)]
        #: (first id, id after the last) of vision's and of audio's tokens.
        self.media_ids = list(zip(starts, [starts[1], vocab], strict=True))
        if any(end - start > size for (start, end), size in zip(self.media_ids, sizes, strict=True)):
            raise BadModelConfig(
                f"config.json: vocab_size {vocab} does not fit the media tokens: vision has {sizes[0]} from"
                f" {starts[0]}, audio {sizes[1]} from {starts[1]}"
            )
        sources = ((vision, sizes[0], 2048), (audio, sizes[1], 1536))
        self.embed_vision, self.embed_audio = (
            MediaTokens(size, section.integer("hidden_size", width), shape.hidden,
                        section.number("rms_norm_eps", 1e-6), place=place)
            for section, size, width in sources
        )  # fmt: skip

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield r"model\.(vision_tower|audio_tower)\..+"
        yield r"model\.embed_(vision|audio)\.soft_embedding_norm\.weight"

    def embed(self, input_ids: Tensor) -> Tensor:
        x = super().embed(input_ids)
        for (start, end), tokens in zip(self.media_ids, (self.embed_vision, self.embed_audio), strict=True):
            places = ((input_ids >= start) & (input_ids < end)).nonzero().squeeze(1)
            if len(places):
                x[places] = tokens(input_ids[places] - start)
        return x

    def _checkpoint_name(self, name: str) -> str:
        return f"model.{name}" if name.startswith(("embed_vision.", "embed_audio.")) else super()._checkpoint_name(name)
