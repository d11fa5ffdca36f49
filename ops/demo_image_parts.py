"""The files of the demo image model beside its weights, in the layout that diffusers gives a FLUX pipeline.

Both tokenizers hold every word of the captions as one token, with and without a capital; other words are spelled.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

from demo_image_data import words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SIDE = 128
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
#: Tokens that the long encoder reads; captions have at most 24 with the one that ends them.
MAX_LENGTH = 32
CLIP_LENGTH = 77

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
#: As FLUX.1-schnell's.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.42.1",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def vae_config() -> dict[str, Any]:
    """FLUX's four levels and 16 latent channels. One norm group: two channels normed together lose a flat colour."""
    channels = [16, 32, 48, 64]
    return {
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 1,
        "out_channels": 3,
        "sample_size": SIDE,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def transformer_config() -> dict[str, Any]:
    """schnell-like: no guidance."""
    return {
        "attention_head_dim": 40,
        "axes_dims_rope": [8, 16, 16],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 96,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_single_layers": 4,
        "patch_size": 1,
        "pooled_projection_dim": 64,
    }


def clip_config(vocab_size: int) -> dict[str, Any]:
    """eos_token_id 2 as in the published files: the pooled state is that of the largest id."""
    return {
        "bos_token_id": vocab_size - 2,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 64,
        "intermediate_size": 256,
        "max_position_embeddings": CLIP_LENGTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": vocab_size - 1,
        "projection_dim": 64,
        "vocab_size": vocab_size,
    }


def t5_config(vocab_size: int) -> dict[str, Any]:
    """The shape of T5 v1.1: gated feed-forward, embeddings not tied."""
    return {
        "d_ff": 192,
        "d_kv": 24,
        "d_model": 96,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }


def write_t5_tokenizer(folder: Path) -> int:
    """tokenizer.json of a Unigram model and its configuration; the vocabulary's size."""
    pieces = [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0), ("▁", -3.0)]
    pieces += [("▁" + way, -4.0) for word in words() for way in dict.fromkeys((word, word.capitalize()))]
    # Any other word is a space and its letters, which cost more than a piece that is there.
    pieces += [(character, -8.0) for character in string.printable[:94]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    config = {"clean_up_tokenization_spaces": True, "extra_ids": 0, "model_max_length": MAX_LENGTH}
    write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "T5Tokenizer"} | names)
    write_json(folder / "special_tokens_map.json", names)
    return tokenizer.get_vocab_size()


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt, as the published folders have them without tokenizer.json; the vocabulary's size."""
    merges, symbols = _merges(), _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    ids = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[token]): {"content": token, "special": True, **flags} for token in (BOS, EOS)},
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CLIP_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config | names)
    write_json(folder / "special_tokens_map.json", names)
    return len(tokens)


def _merges() -> list[tuple[str, str]]:
    """Pairs in the order in which they are joined, each word in its turn from left to right until it is one token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words():
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            # What earlier words have taught comes first, as it will when the word is read.
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            symbols[at : at + 2] = ["".join(best)]
    return list(ranks)


def _byte_symbols() -> list[str]:
    """The characters that stand for the 256 bytes, printable ones first as in the published vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
