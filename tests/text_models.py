"""Small tokenizers in the three manners of the families, and their folders. Built here, no network."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "def add(a, b):\n    return a + b\n",
    "user assistant system model thinking turn hello world, how are you?",
    "Größe, café, naïve, 你好世界, привет мир, 🙂🚀 and more words.",
    "I'd say: it's 12345 <b>bold</b> items [and] 67 others.",
] * 3

#: Qwen's split, without its line breaks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]


def special(texts, **kwargs):
    return [AddedToken(text, special=True, normalized=False, **kwargs) for text in texts]


def byte_level() -> Tokenizer:
    """As Qwen: GPT-2's alphabet, no prefix space; some added tokens are not special."""
    tokenizer = Tokenizer(BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_tokens(special(QWEN_SPECIAL))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in QWEN_ADDED])
    return tokenizer


def _byte_fallback_model(specials: list[str]) -> BPE:
    """A vocabulary of specials, 256 byte tokens and merges learned on the corpus, as converted from SentencePiece."""
    learned = Tokenizer(BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator(
        [text for text in CORPUS if text.isascii()], BpeTrainer(vocab_size=200, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in model["merges"]]
    return BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")


def byte_fallback() -> Tokenizer:
    """As Gemma: spaces are "▁", unknown characters are bytes, no prefix space, specials inside the vocabulary."""
    tokenizer = Tokenizer(_byte_fallback_model(GEMMA_SPECIAL))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(special(GEMMA_SPECIAL))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


def prefix_space() -> Tokenizer:
    """As Llama 2 and Phi-3: byte fallback with a space before every text, which decoding takes away again."""
    tokens = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(_byte_fallback_model(tokens))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(special(tokens) + special(["<|user|>", "<|end|>", "<|assistant|>"], rstrip=True))
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 in the newer notation: the space before the text belongs to the pre-tokenizer."""
    tokenizer = Tokenizer(_byte_fallback_model(["<unk>", "<s>", "</s>"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_tokens(special(["<unk>", "<s>", "</s>"]))
    return tokenizer


BUILDERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "prefix_space": prefix_space,
    "metaspace": metaspace,
}


def write_folder(folder: Path, tokenizer: Tokenizer, *, config=None, **files) -> Path:
    """A model folder: tokenizer.json, tokenizer_config.json, and files given as name_with_underscores=JSON value."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
