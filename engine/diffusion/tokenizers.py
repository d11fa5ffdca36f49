"""The two tokenizers of a FLUX pipeline, from the files that the published folders have. No torch here.

CLIP's comes as vocab.json and merges.txt: lower-cased, NFC, whitespace as one space, split into words, byte symbols
with `</w>` at a word's end (Radford et al. 2021). T5's comes as tokenizer.json and is taken as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from inferfleet.engine.model_errors import BadModelConfig, ModelUnavailable, UnsupportedModel
from inferfleet.engine.text.tokenizer import TokenizerError, read_json

#: Positions that CLIP's text encoder was trained with.
CLIP_LENGTH = 77
#: Words, contractions, single digits, and runs of anything else.
_WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


class ClipTokenizer:
    """Prompts to ids for the short encoder: cut at its length, ended, and padded to it."""

    def __init__(self, folder: Path, most: int = CLIP_LENGTH) -> None:
        """folder: tokenizer/ of a pipeline. most: tokens that the encoder has positions for. Raises a ModelError."""
        self._config = _config(folder)
        self._backend = _from_json(folder) if (folder / "tokenizer.json").is_file() else self._from_vocabulary(folder)
        self.length = _length(folder, self._config, min(most, CLIP_LENGTH))
        bos, eos = self._special("bos_token", "<|startoftext|>"), self._special("eos_token", "<|endoftext|>")
        pad = self._special("pad_token", "<|endoftext|>")
        self.bos_id, self.eos_id, self.pad_id = (_id(self._backend, token, folder) for token in (bos, eos, pad))

    def encode(self, prompt: str) -> list[int]:
        """`length` ids: begin, as much of the prompt as goes in, end, padding."""
        ids = self._backend.encode(prompt, add_special_tokens=False).ids[: self.length - 2]
        return [self.bos_id, *ids, self.eos_id, *[self.pad_id] * (self.length - 2 - len(ids))]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return _vocab_size(self._backend)

    def _special(self, name: str, default: str) -> str:
        return _content(self._config.get(name)) or default

    def _from_vocabulary(self, folder: Path) -> tokenizers.Tokenizer:
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        for path in (vocabulary, merges):
            if not path.is_file():
                raise ModelUnavailable(f"there is no {path.name} in {folder}, and no tokenizer.json")
        unknown = self._special("unk_token", "<|endoftext|>")
        try:
            words, pairs = models.BPE.read_file(str(vocabulary), str(merges))
            model = models.BPE(words, pairs, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>")
        except Exception as error:  # the library raises bare Exception
            raise BadModelConfig(f"{vocabulary} and {merges.name} cannot be used: {error}") from error
        backend = tokenizers.Tokenizer(model)
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        backend.normalizer = normalizers.Sequence(steps)
        words_only = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words_only, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.add_special_tokens(self._added(unknown, folder))
        return backend

    def _added(self, unknown: str, folder: Path) -> list[AddedToken]:
        """The tokens that are found in a text before anything else, in the order of their ids."""
        listed = self._config.get("added_tokens_decoder") or {}
        try:
            tokens = [_added_token(listed[key]) for key in sorted(listed, key=int)]
        except (TypeError, ValueError, KeyError) as error:
            where = folder / "tokenizer_config.json"
            raise BadModelConfig(f"{where}: added_tokens_decoder must map ids to tokens: {error!r}") from error
        known = {token.content for token in tokens}
        named = [self._special("bos_token", "<|startoftext|>"), unknown]
        named += [self._special(name, "<|endoftext|>") for name in ("eos_token", "pad_token")]
        return tokens + [AddedToken(text, special=True) for text in dict.fromkeys(named) if text not in known]


class T5Tokenizer:
    """Prompts to ids for the long encoder."""

    def __init__(self, folder: Path) -> None:
        """folder: tokenizer_2/ of a pipeline. Raises a ModelError."""
        if not (folder / "tokenizer.json").is_file() and (folder / "spiece.model").is_file():
            raise UnsupportedModel(
                f"{folder} has spiece.model alone, and this engine reads tokenizer.json; save the folder once with"
                " transformers' T5TokenizerFast, or take a repository that has the file"
            )
        config = _config(folder)
        self._backend = _from_json(folder)
        self.max_length = _length(folder, config, 512)
        self.pad_id = _id(self._backend, _content(config.get("pad_token")) or "<pad>", folder)

    def encode(self, prompt: str) -> list[int]:
        """All ids of a prompt, the end included, however many they are."""
        ids: list[int] = self._backend.encode(prompt).ids
        return ids

    def pad(self, ids: list[int], length: int) -> list[int]:
        """The ids, filled up to `length`."""
        return ids + [self.pad_id] * (length - len(ids))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return _vocab_size(self._backend)


def _from_json(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelUnavailable(f"there is no tokenizer.json in {folder}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadModelConfig(f"{path} cannot be used: {error}") from error
    # Settings of training time that some folders carry along.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _config(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and, above it, tokenizer_config.json."""
    if not folder.is_dir():
        raise ModelUnavailable(f"there is no folder {folder}")
    try:
        return read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    except TokenizerError as error:
        raise BadModelConfig(str(error)) from error


def _length(folder: Path, config: dict[str, Any], most: int) -> int:
    """model_max_length, at most `most`: old files say 1e30 where they mean none."""
    value = config.get("model_max_length", most)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 3:
        where = folder / "tokenizer_config.json"
        raise BadModelConfig(f"{where}: model_max_length must be a number of at least 3, not {value!r}")
    return int(min(value, most))


def _content(token: Any) -> str | None:
    """The text of a special token, which files write as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _added_token(said: dict[str, Any]) -> AddedToken:
    """As tokenizer_config.json describes one. Raises KeyError or TypeError."""
    flags = {name: bool(said[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in said}
    return AddedToken(said["content"], special=bool(said.get("special", True)), **flags)


def _id(backend: tokenizers.Tokenizer, token: str, folder: Path) -> int:
    found: int | None = backend.token_to_id(token)
    if found is None:
        raise BadModelConfig(f"{folder}: its vocabulary has no token {token!r}")
    return found


def _vocab_size(backend: tokenizers.Tokenizer) -> int:
    return 1 + max(backend.get_vocab(with_added_tokens=True).values())
