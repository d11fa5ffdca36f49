"""Small random FLUX pipelines as the hub holds them, made without transformers.

`write` makes a folder that `diffusers.FluxPipeline.from_pretrained` loads. Weights are lively on purpose: norms are not
ones, modulations and biases weigh, pictures have contrast, so that a forgotten factor shows.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_tokenizers import CLIP_VOCAB_SIZE, T5_VOCAB_SIZE, write_clip_tokenizer, write_t5_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

LICENCES = {
    "apache-2.0": "---\nlanguage:\n- en\nlicense: apache-2.0\ntags:\n- text-to-image\n---\n# A tiny model\n",
    "flux-1-dev-non-commercial-license": (
        "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\n---\n# Tiny\n"
    ),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a pipeline. The transformer's heads have sum(axes) channels."""

    guided: bool = False
    heads: int = 2
    axes: tuple[int, int, int] = (4, 6, 6)
    layers: int = 2
    single_layers: int = 2
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (8, 16, 16, 16)
    vae_quant_conv: bool = False
    #: Side of the model's default picture in pixels.
    sample_size: int = 64
    clip_hidden: int = 24
    clip_heads: int = 3
    clip_layers: int = 2
    clip_act: str = "quick_gelu"
    #: 2, as the published files say, or None for the id that the tokenizer has.
    clip_eos: int | None = 2
    t5_model: int = 32
    t5_heads: int = 4
    t5_kv: int = 8
    t5_ff: int = 48
    t5_layers: int = 2
    t5_buckets: int = 32
    t5_distance: int = 128
    t5_feed_forward: str = "gated-gelu"
    max_length: int = 512

    @property
    def inner(self) -> int:
        return self.heads * sum(self.axes)


#: Seed i takes shape i modulo their number: schnell-like and dev-like in turn.
SHAPES = (
    Shape(),
    Shape(
        guided=True,
        heads=3,
        axes=(2, 8, 6),
        layers=1,
        single_layers=3,
        vae_channels=(8, 16, 16),
        clip_hidden=32,
        clip_heads=2,
        clip_eos=None,
        clip_act="gelu",
        t5_model=40,
        t5_heads=2,
        t5_kv=12,
        t5_buckets=16,
        t5_distance=40,
        sample_size=32,
    ),
    Shape(
        heads=4,
        axes=(4, 4, 4),
        layers=3,
        single_layers=1,
        latent_channels=4,
        vae_channels=(8, 8, 16),
        vae_quant_conv=True,
        t5_feed_forward="relu",
        t5_ff=64,
        t5_layers=3,
        max_length=128,
    ),
    Shape(guided=True, heads=1, axes=(8, 12, 12), layers=1, single_layers=1, latent_channels=16, clip_layers=3),
)


def write(
    folder: Path,
    seed: int = 0,
    *,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    licence: str | None = "",
    **changes: Any,
) -> Shape:
    """Writes a pipeline; `changes` replace fields of the shape.

    shards: files that the transformer and T5 are cut into (1 = one file without an index). licence: the README's tag;
    "" = the one that fits, None = no README.
    """
    shape = dataclasses.replace(shape or SHAPES[seed % len(SHAPES)], **changes)
    random = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "model_index.json", MODEL_INDEX)
    if licence is not None:
        tag = licence or ("flux-1-dev-non-commercial-license" if shape.guided else "apache-2.0")
        (folder / "README.md").write_text(LICENCES.get(tag, f"---\nlicense: {tag}\n---\n"))
    _json(_made(folder / "scheduler") / "scheduler_config.json", scheduler_config(shape))
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2", shape.max_length)
    for name, (config, tensors) in components(shape, random).items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        if name.startswith("text"):
            config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
        _json(_made(folder / name) / "config.json", config)
        rounded = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        save(folder / name, stem, rounded, shards if name in ("transformer", "text_encoder_2") else 1)
    return shape


def components(shape: Shape, random: torch.Generator) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Configuration and float32 tensors of the four networks, by folder."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    transformer, vae = transformer_config(shape), vae_config(shape)
    plain = {key: value for key, value in transformer.items() if not key.startswith("_")}
    flux = FluxTransformer2DModel(**plain)
    autoencoder = AutoencoderKL(**{key: value for key, value in vae.items() if not key.startswith("_")})
    enliven(flux, random)
    enliven(autoencoder, random)
    with torch.no_grad():
        # Pictures that use the range from black to white and leave it seldom.
        autoencoder.decoder.conv_out.weight.mul_(0.6)
        autoencoder.decoder.conv_out.bias.mul_(0.3)
    return {
        "transformer": (transformer, dict(flux.state_dict())),
        "vae": (vae, dict(autoencoder.state_dict())),
        "text_encoder": (clip_config(shape), drawn(clip_shapes(shape), random)),
        "text_encoder_2": (t5_config(shape), drawn(t5_shapes(shape), random)),
    }


MODEL_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def scheduler_config(shape: Shape) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0 if shape.guided else 1.0,
        "use_dynamic_shifting": shape.guided,
    }


def transformer_config(shape: Shape) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0.dev0",
        "attention_head_dim": sum(shape.axes),
        "axes_dims_rope": list(shape.axes),
        "guidance_embeds": shape.guided,
        "in_channels": 4 * shape.latent_channels,
        "joint_attention_dim": shape.t5_model,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "num_single_layers": shape.single_layers,
        "patch_size": 1,
        "pooled_projection_dim": shape.clip_hidden,
    }


def vae_config(shape: Shape) -> dict[str, Any]:
    levels = len(shape.vae_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0.dev0",
        "act_fn": "silu",
        "block_out_channels": list(shape.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": shape.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": shape.sample_size,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": shape.vae_quant_conv,
        "use_quant_conv": shape.vae_quant_conv,
    }


def clip_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": CLIP_VOCAB_SIZE - 1 if shape.clip_eos is None else shape.clip_eos,
        "hidden_act": shape.clip_act,
        "hidden_size": shape.clip_hidden,
        "intermediate_size": 2 * shape.clip_hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": shape.clip_heads,
        "num_hidden_layers": shape.clip_layers,
        "pad_token_id": 1,
        "projection_dim": shape.clip_hidden,
        "vocab_size": CLIP_VOCAB_SIZE,
    }


def clip_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file."""
    d, wide = shape.clip_hidden, 2 * shape.clip_hidden
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.position_embedding.weight": (77, d),
        "text_model.embeddings.token_embedding.weight": (CLIP_VOCAB_SIZE, d),
        "text_model.final_layer_norm.bias": (d,),
        "text_model.final_layer_norm.weight": (d,),
    }
    for layer in range(shape.clip_layers):
        at = f"text_model.encoder.layers.{layer}"
        sizes = {f"self_attn.{name}_proj": (d, d) for name in "kvq"} | {"self_attn.out_proj": (d, d)}
        sizes |= {"mlp.fc1": (wide, d), "mlp.fc2": (d, wide)}
        for name, size in sizes.items():
            shapes |= {f"{at}.{name}.weight": size, f"{at}.{name}.bias": size[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (d,), f"{at}.{norm}.bias": (d,)}
    return shapes


def t5_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": shape.t5_ff,
        "d_kv": shape.t5_kv,
        "d_model": shape.t5_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": shape.t5_feed_forward,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": shape.t5_layers,
        "num_heads": shape.t5_heads,
        "num_layers": shape.t5_layers,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": shape.t5_distance,
        "relative_attention_num_buckets": shape.t5_buckets,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": T5_VOCAB_SIZE,
    }


def t5_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file: the embedding once, as `shared.weight`."""
    d, inner, wide = shape.t5_model, shape.t5_heads * shape.t5_kv, shape.t5_ff
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (T5_VOCAB_SIZE, d), "encoder.final_layer_norm.weight": (d,)}
    buckets = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[buckets] = (shape.t5_buckets, shape.t5_heads)
    gated = shape.t5_feed_forward.startswith("gated")
    for layer in range(shape.t5_layers):
        at = f"encoder.block.{layer}.layer"
        shapes |= {f"{at}.0.SelfAttention.{name}.weight": (inner, d) for name in "qkv"}
        shapes |= {f"{at}.0.SelfAttention.o.weight": (d, inner), f"{at}.1.DenseReluDense.wo.weight": (d, wide)}
        shapes |= {
            f"{at}.1.DenseReluDense.{name}.weight": (wide, d) for name in (("wi_0", "wi_1") if gated else ("wi",))
        }
        shapes |= {f"{at}.{number}.layer_norm.weight": (d,) for number in (0, 1)}
    return shapes


def drawn(shapes: Mapping[str, tuple[int, ...]], random: torch.Generator) -> dict[str, Tensor]:
    """A text encoder's tensors."""
    return {name: _value(name, size, random) for name, size in shapes.items()}


def enliven(model: nn.Module, random: torch.Generator) -> None:
    """Random weights in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_value(name, tuple(tensor.shape), random))


def _value(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=random)
    leaf = name.split(".")[-2]
    if "norm" in leaf and len(shape) == 1:
        return normal * 0.3 + (1 if name.endswith("weight") else 0)
    if len(shape) == 1:
        return normal * 0.2
    if "embed" in leaf or leaf == "shared":
        return normal
    if leaf == "relative_attention_bias":
        return normal * 2
    if name.endswith("SelfAttention.q.weight"):
        # T5 has no 1/sqrt(d): published weights carry it. Scores of a few units, as a trained model has.
        return normal * shape[0] ** -0.5 * shape[1] ** -0.5 * 2
    return normal * 1.1 * math.prod(shape[1:]) ** -0.5


def save(folder: Path, stem: str, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One file, or several with an index, as the hub names them."""
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    files = [f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    names = list(tensors)
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {name: files[number % shards] for number, name in enumerate(names)}
    _json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def change(path: Path, **values: Any) -> None:
    """Keys of a JSON file anew."""
    _json(path, json.loads(path.read_text()) | values)


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
