"""The two tokenizers of a small FLUX pipeline, in the files that the published folders have."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

_TEXT = (
    "a red green blue yellow white black circle square triangle on the background small large top left right bottom "
    "photo of cat dog and with paint ing light house don isn it we you they ll ve re"
)
WORDS = _TEXT.split()
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in the order of the published vocabulary: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def _merges() -> list[tuple[str, str]]:
    """Left to right merges of the words."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            found[symbols[0], symbols[1]] = None
            symbols[:2] = [symbols[0] + symbols[1]]
    return list(found)


MERGES = _merges()
_SYMBOLS = _byte_symbols()
#: As published: bytes, bytes at a word's end, merges, and the two special tokens last.
CLIP_VOCAB = [*_SYMBOLS, *(symbol + "</w>" for symbol in _SYMBOLS), *dict.fromkeys(a + b for a, b in MERGES), BOS, EOS]
CLIP_VOCAB_SIZE = len(CLIP_VOCAB)


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, without a tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(CLIP_VOCAB)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in MERGES)]) + "\n")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    specials = {"bos_token": {"content": BOS, **flags}, "eos_token": {"content": EOS, **flags}}
    specials |= {"unk_token": {"content": EOS, **flags}}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials | {"pad_token": EOS}))
    first = CLIP_VOCAB_SIZE - 2
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first + i): {"content": token, "special": True, **flags} for i, token in enumerate((BOS, EOS))
        },
        "bos_token": BOS,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _t5_pieces() -> list[tuple[str, float]]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(character, -6.0) for character in string.printable[:94]]
    pieces += [("▁" + word, -4.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    pieces += [(word, -5.0 - 0.01 * i) for i, word in enumerate(WORDS) if len(word) > 1]
    return pieces + [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]


T5_PIECES = _t5_pieces()
#: The published matrix has more rows than the tokenizer has ids.
T5_VOCAB_SIZE = len(T5_PIECES) + 28


def write_t5_tokenizer(folder: Path, max_length: int = 512) -> None:
    """tokenizer.json and its configuration."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(T5_PIECES, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    extra = [f"<extra_id_{number}>" for number in range(100)]
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": 100,
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    specials = {"additional_special_tokens": extra, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
